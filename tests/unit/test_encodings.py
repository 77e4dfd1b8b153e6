import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from deme_core.encodings import (
    Embeddings,
    EncodedBatches,
    Latents,
    distinct_captions,
    write_embeddings,
    write_latents,
)
from deme_core.encodings.row_file import Rows, RowWriter
from deme_core.families import Adapter, EncodedBatch, encode_batch
from deme_core.images import ImageSubset, TrainingBatches, load_images, split_heldout
from deme_core.model_folder import open_model_folder
from deme_core.recipe import DatasetSpec
from tests.tiny_models import same_bits
from tests.tiny_pipelines import PIPELINES, save_pipeline

CLASSES = ("cat", "dog", "frog")
NUM_IMAGES = 21


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in a folder for each class, of other shapes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = root / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (17 + number, 23, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(request.param, tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture
def training(images: Path, tmp_path: Path) -> ImageSubset:
    spec = DatasetSpec(
        source="imagefolder",
        path=str(images),
        resolution=16,
        caption_template="a photo of a {label}",
        label_column="label",
        num_heldout_images=3,
    )
    return split_heldout(load_images(spec, cache=tmp_path / "cache"), spec.num_heldout_images)[0]


# Where an adapter keeps what it has loaded.
FROZEN_PARTS = {"vae", "_text_pipeline"}
SETTINGS: dict[str, Any] = {"batch_size": 4, "seed": 5, "random_flip": True, "caption_dropout": 0.4}


def from_images(adapter: Adapter, training: ImageSubset, **settings: Any) -> Iterator[EncodedBatch]:
    for batch in TrainingBatches(training, random_crop=False, **SETTINGS | settings):
        encoded = encode_batch(
            adapter,
            batch.clean_images,
            captions=batch.captions,
            labels=batch.labels,
            sizes=batch.sizes,
        )
        assert FROZEN_PARTS & vars(adapter).keys()
        yield encoded


def encode(
    folder: Path, adapter: Adapter, training: ImageSubset, *, slice_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Latents, Embeddings | None]:
    """Encodes the whole data set in slices."""
    whole = training.dataset
    latents = [folder / f"latents-{low}" for low in range(0, len(whole), slice_size)]
    for number, path in enumerate(latents):
        path.mkdir(parents=True)
        low, high = number * slice_size, min((number + 1) * slice_size, len(whole))
        done = list(write_latents(path, whole, adapter, low=low, high=high, mirrored=True, dtype=dtype))
        assert done[-1] == high - low
    read = Latents(latents, resolution=16, mirrored=True)
    if adapter.conditioned_on != "captions":
        return read, None
    texts = distinct_captions(training.captions or ())
    embeddings = [folder / f"texts-{low}" for low in range(0, len(texts), slice_size)]
    for number, path in enumerate(embeddings):
        path.mkdir()
        some = texts[number * slice_size : (number + 1) * slice_size]
        assert list(write_embeddings(path, some, adapter, dtype=dtype))[-1] == len(some)
    return read, Embeddings(embeddings, texts)


def from_encodings(
    pipeline: Path, training: ImageSubset, encodings: tuple[Latents, Embeddings | None], **settings: Any
) -> Iterator[EncodedBatch]:
    """Reads, and shows that neither autoencoder nor text encoder was loaded for it."""
    adapter = open_model_folder(pipeline).adapter()
    for batch in EncodedBatches(training, training.indices, *encodings, adapter, **SETTINGS | settings):
        assert not FROZEN_PARTS & vars(adapter).keys()
        yield batch


def differences(left: EncodedBatch, right: EncodedBatch) -> Mapping[str, float]:
    assert left.conditioning.keys() == right.conditioning.keys()
    pairs = {"latents": (left.latents, right.latents)} | {
        name: (tensor, right.conditioning[name]) for name, tensor in left.conditioning.items()
    }
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs.values())
    return {name: float((a.double() - b.double()).abs().max()) for name, (a, b) in pairs.items()}


def test_batches_of_encodings_are_those_of_images(pipeline: Path, training: ImageSubset, tmp_path: Path) -> None:
    adapter = open_model_folder(pipeline).adapter()
    encodings = encode(tmp_path / "encoded", adapter, training, slice_size=2)
    cached, fresh = from_encodings(pipeline, training, encodings), from_images(adapter, training)
    for left, right in itertools.islice(zip(cached, fresh, strict=True), 12):
        assert same_bits(left.latents, right.latents)
        # An encoder's last bits depend on how many texts it is given at once.
        assert max(differences(left, right).values()) < 1e-5


def test_another_precision_takes_half_the_bytes(pipeline: Path, training: ImageSubset, tmp_path: Path) -> None:
    adapter = open_model_folder(pipeline).adapter()
    batches = []
    for name, dtype in (("half", torch.float16), ("full", torch.float32)):
        encodings = encode(tmp_path / name, adapter, training, slice_size=100, dtype=dtype)
        batches.append(next(from_encodings(pipeline, training, encodings)))
    assert 0 < differences(*batches)["latents"] < 1e-2
    assert all(difference < 1e-2 for difference in differences(*batches).values())
    sizes = [(tmp_path / name / "latents-0" / "latents.safetensors").stat().st_size for name in ("half", "full")]
    num_values = load_file(tmp_path / "full" / "latents-0" / "latents.safetensors")["rows"].numel()
    assert sizes[1] - sizes[0] == 2 * num_values


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("StableDiffusionPipeline", tmp_path_factory.mktemp("sd") / "model")


def test_a_resumed_stream_is_the_same_stream(stable_diffusion: Path, training: ImageSubset, tmp_path: Path) -> None:
    encodings = encode(tmp_path / "encoded", open_model_folder(stable_diffusion).adapter(), training, slice_size=7)
    whole = list(itertools.islice(from_encodings(stable_diffusion, training, encodings), 15))
    resumed = from_encodings(stable_diffusion, training, encodings, start_batch=9)
    for left, right in zip(itertools.islice(resumed, 6), whole[9:], strict=True):
        assert not any(differences(left, right).values())
    state = torch.get_rng_state()
    other = next(from_encodings(stable_diffusion, training, encodings, seed=6))
    assert differences(other, whole[0])["latents"] > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_each_caption_is_stored_once_and_the_empty_one_is_there(
    stable_diffusion: Path, training: ImageSubset, tmp_path: Path
) -> None:
    texts = distinct_captions(training.captions or ())
    assert texts == ["", *(f"a photo of a {name}" for name in CLASSES)]
    adapter = open_model_folder(stable_diffusion).adapter()
    _, embeddings = encode(tmp_path / "encoded", adapter, training, slice_size=100)
    assert embeddings is not None
    stored = load_file(tmp_path / "encoded" / "texts-0" / "encoder_hidden_states.safetensors")["rows"]
    assert len(stored) == len(embeddings) == 4
    dropping = from_encodings(stable_diffusion, training, encode_again(tmp_path, embeddings), caption_dropout=1.0)
    states = next(dropping).conditioning["encoder_hidden_states"]
    assert same_bits(states, stored[:1].expand(4, -1, -1))
    torch.testing.assert_close(states[:1], adapter.encode_prompts([""])["encoder_hidden_states"])


def encode_again(tmp_path: Path, embeddings: Embeddings) -> tuple[Latents, Embeddings]:
    return Latents([tmp_path / "encoded" / "latents-0"], resolution=16, mirrored=True), embeddings


# Files of rows


def test_rows_of_several_files_are_one_tensor(tmp_path: Path) -> None:
    values = torch.randn(11, 2, 3)
    paths = [tmp_path / f"{number}" for number in range(4)]
    for path, piece in zip(paths, values.split([4, 1, 5, 1]), strict=True):
        with RowWriter(path, len(piece)) as writer:
            for some in piece.split(2):
                writer.append(some)
    rows, indices = Rows(paths), torch.tensor([10, 0, 3, 4, 5, 9, 3])
    assert len(rows) == 11
    assert same_bits(rows[indices], values[indices])
    assert same_bits(load_file(paths[2])["rows"], values[5:10])
    for index in (11, -12):
        with pytest.raises(IndexError):
            rows[torch.tensor([index])]


def test_what_is_no_float_keeps_its_type(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 0], [1, 1]])
    with RowWriter(tmp_path / "mask", 2, torch.float16) as writer:
        writer.append(mask)
    assert same_bits(Rows([tmp_path / "mask"])[torch.tensor([1, 0])], mask.flip(0))


def test_rows_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not belong"), RowWriter(tmp_path / "a", 2) as writer:
        writer.append(torch.zeros(1, 3))
        writer.append(torch.zeros(1, 4))
    with pytest.raises(AssertionError), RowWriter(tmp_path / "b", 3) as writer:
        writer.append(torch.zeros(2, 3))
