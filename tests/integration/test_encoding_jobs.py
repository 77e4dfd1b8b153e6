"""The jobs that encode a data set, and trainings on what they made, on a real tiny Stable Diffusion."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from deme_core.errors import InputError, RecipeError
from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, FinetuneSpec, Recipe
from deme_core.settings import Settings
from flows.encodings import EncodedDataset, encode_dataset
from tasks.jobs import EmbeddingsJob, FinetuneJob, ImportJob, Job, JobResult, LatentsJob
from tasks.work import finetune as finetune_work
from tasks.work.base import JobContext, execute
from tests.tiny_models import one_level_unet, randomize, write_tiny_folder
from tests.tiny_pipelines import save_pipeline, stable_diffusion

NUM_IMAGES = 40
UNET = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}


class Laboratory:
    """Does jobs in this process, on images in a folder for each of three classes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.context = JobContext(Settings.model_validate({"DEME_HOME": home, "DEME_STORE_URI": None}), "cpu")
        rng = np.random.default_rng(0)
        for number in range(NUM_IMAGES):
            path = home / "images" / ("cat", "dog", "frog")[number % 3] / f"{number}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(path)
        self.model = self.imported(save_pipeline("StableDiffusionPipeline", home / "model"))

    def imported(self, folder: Path) -> JobResult:
        return self.do(ImportJob(source=str(folder)))

    def do(self, job: Job) -> JobResult:
        return execute(job, self.context, lambda _: None)

    def dataset(self, **settings: Any) -> DatasetSpec:
        images = {"source": "imagefolder", "path": str(self.home / "images"), "resolution": 16}
        captions = {"caption_template": "a photo of a {label}"}
        return DatasetSpec.model_validate(images | captions | {"num_heldout_images": 4} | settings)

    def encoded(self, dataset: DatasetSpec, *, step: int = 16, model: JobResult | None = None) -> EncodedDataset:
        def slices(kind: type[LatentsJob] | type[EmbeddingsJob]) -> tuple[ArtifactRef, ...]:
            def do(low: int) -> JobResult:
                ref = (model or self.model).ref
                return self.do(kind(pretrained=ref, dataset=dataset, low=low, high=low + step))

            first = do(0)
            return (first.ref, *(do(low).ref for low in range(step, first.metrics["num_in_all"], step)))

        return EncodedDataset(slices(LatentsJob), slices(EmbeddingsJob))

    def finetune_job(self, dataset: DatasetSpec, encoded: EncodedDataset | None = None, **spec: Any) -> FinetuneJob:
        settings = {"num_steps": 6, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2}
        encoded = encoded or EncodedDataset()
        return FinetuneJob(
            label="segment",
            pretrained=self.model.ref,
            dataset=dataset,
            finetune=FinetuneSpec.model_validate(settings | spec),
            low=0,
            high=500,
            num_steps=6,
            latents=encoded.latents,
            embeddings=encoded.embeddings,
        )

    def weights(self, job: FinetuneJob) -> dict[str, torch.Tensor]:
        return load_file(self.context.fetch(self.do(job).ref) / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("laboratory"))


AUGMENTED = {"random_flip": True, "caption_dropout": 0.3}


def test_a_training_on_encodings_is_the_training_on_images(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = laboratory.dataset(**AUGMENTED)
    uncached = laboratory.finetune_job(dataset)
    cached = laboratory.finetune_job(dataset, laboratory.encoded(dataset))
    expected, before = laboratory.weights(uncached), DiffusionPipeline.from_pretrained(laboratory.home / "model")
    with monkeypatch.context() as patch:
        patch.setattr("diffusers.AutoencoderKL.from_pretrained", None)
        patch.setattr("transformers.CLIPTextModel.from_pretrained", None)
        actual = laboratory.weights(cached)
    assert actual.keys() == expected.keys()
    started = before.unet.state_dict()
    moved = max(float((expected[name] - started[name]).abs().max()) for name in started)
    # What is left is rounding: an encoder's last bits depend on how many texts it is given at once.
    assert max(float((actual[name] - expected[name]).abs().max()) for name in actual) < moved / 100
    assert laboratory.do(cached).ref != laboratory.do(uncached).ref


def test_how_the_data_set_was_sliced_changes_nothing(laboratory: Laboratory) -> None:
    dataset = laboratory.dataset(**AUGMENTED)
    in_slices, at_once = laboratory.encoded(dataset, step=16), laboratory.encoded(dataset, step=64)
    assert (len(in_slices.latents), len(at_once.latents)) == (3, 1)
    results = [laboratory.do(laboratory.finetune_job(dataset, encoded)) for encoded in (in_slices, at_once)]
    assert results[0].ref == results[1].ref
    pieces = [load_file(laboratory.context.fetch(ref) / "latents.safetensors")["rows"] for ref in in_slices.latents]
    whole = load_file(laboratory.context.fetch(at_once.latents[0]) / "latents.safetensors")["rows"]
    assert torch.equal(torch.cat(pieces), whole)
    assert len(whole) == NUM_IMAGES


def test_a_data_set_that_grew_behind_its_first_captions_is_encoded_as_a_whole(laboratory: Laboratory) -> None:
    def embedded(template: str, low: int) -> JobResult:
        dataset = laboratory.dataset(caption_template=template)
        return laboratory.do(EmbeddingsJob(pretrained=laboratory.model.ref, dataset=dataset, low=low, high=low + 1))

    # The first caption is the empty one.
    one, three = embedded("a cat", 0), embedded("a {label}", 0)
    assert (one.metrics["num_in_all"], three.metrics["num_in_all"]) == (2, 4)
    assert embedded("a {label}", 0).cached


def test_a_training_that_was_killed_resumes_on_encodings_bit_for_bit(laboratory: Laboratory, tmp_path: Path) -> None:
    dataset = laboratory.dataset(**AUGMENTED)
    job = laboratory.finetune_job(dataset, laboratory.encoded(dataset), seed=7)
    digest = "0" * 64
    work, out = finetune_work.run(job, laboratory.context, tmp_path, digest), tmp_path / "unet"
    for record in work:
        if record.get("global_step") == 4:  # The checkpoint of step 2 is there, that of step 4 is not.
            work.close()
    assert not out.exists()
    messages = [r["message"] for r in finetune_work.run(job, laboratory.context, tmp_path, digest) if "message" in r]
    assert messages == ["resumed at step 2"]
    resumed, expected = load_file(out / "diffusion_pytorch_model.safetensors"), laboratory.weights(job)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_encodings_are_shared_by_all_that_they_depend_on_nothing_of(laboratory: Laboratory, tmp_path: Path) -> None:
    other = stable_diffusion()
    randomize(other.unet, seed=3)
    other.save_pretrained(tmp_path / "other-unet")
    randomize(other.vae, seed=4)
    other.save_pretrained(tmp_path / "other-vae")
    other_unet, other_vae = (laboratory.imported(tmp_path / name) for name in ("other-unet", "other-vae"))
    plain = laboratory.encoded(laboratory.dataset())
    assert laboratory.model.ref != other_unet.ref
    assert laboratory.encoded(laboratory.dataset(), model=other_unet) == plain
    changed = laboratory.encoded(laboratory.dataset(), model=other_vae)
    assert (changed.latents != plain.latents, changed.embeddings) == (True, plain.embeddings)
    captioned = laboratory.encoded(laboratory.dataset(caption_template="{label}", caption_dropout=0.1))
    assert (captioned.latents, captioned.embeddings != plain.embeddings) == (plain.latents, True)
    flipped = laboratory.encoded(laboratory.dataset(random_flip=True))
    assert (flipped.latents != plain.latents, flipped.embeddings) == (True, plain.embeddings)
    halved = laboratory.encoded(laboratory.dataset(cache_precision="fp16"))
    assert not {*halved.latents, *halved.embeddings} & {*plain.latents, *plain.embeddings}


def test_a_model_that_stock_diffusers_loads_and_saves_stays_the_same(laboratory: Laboratory, tmp_path: Path) -> None:
    folder, plain = laboratory.home / "model", laboratory.encoded(laboratory.dataset())
    for number in range(2):  # Each notes where it was loaded from: in its index, its denoiser and its autoencoder.
        pipeline = DiffusionPipeline.from_pretrained(folder)
        folder = tmp_path / f"again-{number}"
        pipeline.save_pretrained(folder)
        assert "_name_or_path" in json.loads((folder / "vae" / "config.json").read_text())
        assert laboratory.imported(folder).ref == laboratory.model.ref
    randomize(pipeline.unet, seed=5)
    pipeline.save_pretrained(tmp_path / "next")
    trained_further = laboratory.imported(tmp_path / "next")
    assert trained_further.ref != laboratory.model.ref
    assert laboratory.encoded(laboratory.dataset(), model=trained_further) == plain


def test_embeddings_are_of_one_way_to_encode_the_empty_caption(laboratory: Laboratory, tmp_path: Path) -> None:
    index = save_pipeline("StableDiffusionXLPipeline", tmp_path / "sdxl") / "model_index.json"
    digests = list[str]()
    for zeros in (True, False):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": zeros}))
        encoded = laboratory.encoded(laboratory.dataset(), model=laboratory.imported(index.parent))
        digests.append(encoded.embeddings[0].digest)
    assert digests[0] != digests[1]


def test_a_training_that_caches_nothing_has_the_digest_it_always_had(laboratory: Laboratory) -> None:
    identity = finetune_work.identity(laboratory.finetune_job(laboratory.dataset()), laboratory.context)
    assert identity.settings.keys() == {"finetune", "segment", "num_steps"}


# What the user can do wrong


@pytest.mark.parametrize("kind", [LatentsJob, EmbeddingsJob])
def test_images_without_captions_are_refused_before_anything_is_encoded(
    laboratory: Laboratory, kind: type[LatentsJob] | type[EmbeddingsJob]
) -> None:
    laboratory.encoded(laboratory.dataset())  # What is in the store already must not hide it.
    dataset = laboratory.dataset(caption_template=None)
    with pytest.raises(InputError, match=r"StableDiffusionPipeline is finetuned on images with captions; set dataset"):
        laboratory.do(kind(pretrained=laboratory.model.ref, dataset=dataset, low=0, high=64))


def test_images_of_another_size_are_refused(laboratory: Laboratory) -> None:
    dataset = laboratory.dataset(resolution=8)
    with pytest.raises(InputError, match=r"set dataset\.resolution to 16"):
        laboratory.do(LatentsJob(pretrained=laboratory.model.ref, dataset=dataset, low=0, high=64))


def recipe(dataset: DatasetSpec) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "pretrained": {"source": "model"},
            "dataset": dataset.model_dump(),
            "segments": {"count": 2},
            "finetune": {"num_steps": 1},
            "merge": {"weights": [0.5, 0.5]},
            "evaluate": {"num_images": 2},
        }
    )


def test_a_model_on_pixels_has_no_cache(laboratory: Laboratory, tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "pixels", one_level_unet(), **UNET)
    pixels = laboratory.imported(folder)
    assert encode_dataset(recipe(laboratory.dataset()), pixels) == EncodedDataset()
    with pytest.raises(RecipeError, match="this one is on pixels; leave it out"):
        encode_dataset(recipe(laboratory.dataset(cache_latents=True)), pixels)


@pytest.mark.parametrize("settings", [{"cache_latents": False}, {"crop": "random"}])
def test_the_cache_can_be_left_out(laboratory: Laboratory, settings: dict[str, Any]) -> None:
    assert laboratory.model.metrics["caches"] == ["latents", "embeddings"]
    assert encode_dataset(recipe(laboratory.dataset(**settings)), laboratory.model) == EncodedDataset()


def test_a_cache_of_random_crops_is_refused(laboratory: Laboratory) -> None:
    with pytest.raises(ValueError, match="cache_latents needs crop: center"):
        laboratory.dataset(cache_latents=True, crop="random")
