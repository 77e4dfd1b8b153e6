import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from deme_core.errors import DatasetError
from deme_core.imagenet_classes import imagenet_numbers
from deme_core.images import ImageDataset, TrainingBatch, TrainingBatches, batches, load_images, split_heldout
from deme_core.images.conditioning import read_conditioning
from deme_core.images.preview import Preview, preview_images
from deme_core.images.source import Column
from deme_core.recipe import DatasetSpec

CLASSES = ("cat", "dog", "cat", "frog", "dog")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of other shapes, in a folder for each of three classes."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        path = tmp_path / "images" / "train" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16 + 3 * number, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def parquet(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same images as a parquet data set with columns of many kinds."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    files = sorted(folder.rglob("*.png"))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "some": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["zebra", "ant", "bee"]),
            "unknown": datasets.ClassLabel(names=["x", "y"]),
            "number": datasets.Value("int64"),
            "flag": datasets.Value("bool"),
            "score": datasets.Value("float64"),
            "texts": [datasets.Value("string")],
        }
    )
    rows: dict[str, list[Any]] = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "text": [f"picture {number}" for number in range(5)],
        "some": ["a", None, "", " ", None],
        "kind": [0, 2, 1, 1, 0],
        "unknown": [0, -1, 1, 1, 0],
        "number": [7, 8, 9, 7, 7],
        "flag": [True, False, True, True, False],
        "score": [0.5] * 5,
        "texts": [["a", "b"]] * 5,
    }
    (tmp_path / "parquet").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "parquet" / "train.parquet")
    return tmp_path / "parquet"


def load(path: Path, tmp_path: Path, source: str = "imagefolder", **settings: object) -> ImageDataset:
    return load_images(spec_of(path, source, **settings), cache=tmp_path / "cache")


def spec_of(path: Path, source: str = "imagefolder", **settings: object) -> DatasetSpec:
    return DatasetSpec.model_validate({"source": source, "resolution": 16, "path": str(path), **settings})


def first(count: int, dataset: ImageDataset, **settings: Any) -> list[TrainingBatch]:
    options = {"batch_size": 4, "seed": 3, "random_crop": False, "random_flip": False, **settings}
    return list(itertools.islice(TrainingBatches(dataset, **options), count))


# Captions and labels of each source


def test_the_digits_know_their_labels(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    spec = DatasetSpec(source="digits", caption_template="the digit {label}", label_column="label", num_images=50)
    dataset = load_images(spec, cache=tmp_path)
    expected = load_digits().target[:50].tolist()
    assert dataset.labels == expected
    assert dataset.captions == [f"the digit {digit}" for digit in expected]


@pytest.mark.parametrize("asked", [{"caption_column": "text"}, {"caption_template": "see {text}"}])
def test_half_a_character_is_no_caption(folder: Path, tmp_path: Path, asked: dict[str, str]) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    rows = [{"file_name": name, "text": "a cat" if number else "a \ud83d cat"} for number, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DatasetError, match=rf"^1 of {len(names)} captions .* half of a character, .* \({names[0]}\)"):
        load(folder, tmp_path, **asked)


def test_subfolders_are_classes(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder, tmp_path, caption_template="a photo of a {label}", label_column="label")
    assert dataset.labels == [0, 0, 1, 1, 2]
    assert dataset.captions == [f"a photo of a {name}" for name in ("cat", "cat", "dog", "dog", "frog")]
    part = load(folder, tmp_path, label_column="label", num_images=3)
    assert part.labels == [0, 0, 1]


def rename_classes(folder: Path, *names: str) -> None:
    for old, new in zip(("cat", "dog", "frog"), names, strict=True):
        (folder / "train" / old).rename(folder / "train" / new)


def test_classes_that_are_wordnet_ids_have_imagenets_numbers_and_names(folder: Path, tmp_path: Path) -> None:
    rename_classes(folder, "n01440764", "n02102040", "n02979186")
    asked = {"caption_template": "a photo of a {label}", "label_column": "label"}
    dataset = load(folder, tmp_path, **asked)
    assert dataset.labels == [0, 0, 217, 217, 482]
    names = ("tench", "tench", "English springer", "English springer", "cassette player")
    assert dataset.captions == [f"a photo of a {name}" for name in names]
    found = preview_images(spec_of(folder, **asked), tmp_path / "cache")
    assert (found.caption, found.labels, found.class_names) == ("a photo of a tench", [0, 217, 482], None)
    # So are ids in metadata.
    files = sorted(folder.rglob("*.png"))
    rows = [{"file_name": str(file.relative_to(folder)), "class": file.parent.name} for file in files]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    named = load(folder, tmp_path, caption_template="a photo of a {class}", label_column="class")
    assert named.example_fingerprint == dataset.example_fingerprint


def test_all_of_imagenet_has_the_numbers_that_it_had(folder: Path, tmp_path: Path) -> None:
    rename_classes(folder, "n01440764", "n01443537", "n01484850")  # The first three of them.
    fingerprint = load(folder, tmp_path, label_column="label").example_fingerprint
    for old, new in (("n01440764", "cat"), ("n01443537", "dog"), ("n01484850", "frog")):
        (folder / "train" / old).rename(folder / "train" / new)
    assert load(folder, tmp_path, label_column="label").example_fingerprint == fingerprint
    assert list(imagenet_numbers()) == sorted(imagenet_numbers())


def test_other_names_stay_in_the_order_of_the_alphabet(folder: Path, tmp_path: Path) -> None:
    rename_classes(folder, "n01440764", "n02102040", "n00000001")  # The last is none of ImageNet-1k.
    asked = {"caption_template": "a {label}", "label_column": "label"}
    dataset = load(folder, tmp_path, **asked)
    assert dataset.labels == [0, 1, 1, 2, 2]
    assert dataset.captions is not None
    assert dataset.captions[0] == "a n00000001"
    names = ["n00000001", "n01440764", "n02102040"]
    assert preview_images(spec_of(folder, **asked), tmp_path / "cache").class_names == names


def test_a_folder_without_captions_is_told_where_they_are_read_from(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(
        DatasetError, match=r"set dataset\.caption_column, or write metadata\.jsonl into the folder, with "
    ):
        load(folder, tmp_path, caption_column="text")


def test_columns_of_a_hub_data_set(parquet: Path, tmp_path: Path) -> None:
    dataset = load(parquet, tmp_path, "hub", caption_column="text", label_column="kind")
    assert dataset.captions == [f"picture {number}" for number in range(5)]
    assert dataset.labels == [0, 2, 1, 1, 0]
    dataset = load(parquet, tmp_path, "hub", caption_column="kind", label_column="number")
    assert dataset.captions == ["zebra", "bee", "ant", "ant", "zebra"]
    assert dataset.labels == [7, 8, 9, 7, 7]
    dataset = load(parquet, tmp_path, "hub", caption_template="{number}: {{{text}}} of {kind}", label_column="text")
    assert dataset.captions is not None
    assert dataset.captions[1] == "8: {picture 1} of bee"
    assert dataset.labels == list(range(5))
    labels = load(parquet, tmp_path, "hub", label_column="flag").labels
    assert labels == [1, 0, 1, 1, 0]
    assert {type(label) for label in labels} == {int}


def test_a_preview_of_a_local_folder_reads_its_first_rows_alone(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deme_core.images.hub_preview._NUM_FIRST_ROWS", 2)
    spec = spec_of(parquet, "hub", caption_column="text", label_column="kind")
    found = preview_images(spec, tmp_path / "cache")
    assert found == Preview(None, "picture 0", labels=None, class_names=None)
    assert not list((tmp_path / "hf").rglob("*.arrow"))
    assert preview_images(spec.model_copy(update={"split": "all"}), tmp_path / "cache") == found
    monkeypatch.setattr("deme_core.images.hub_preview._NUM_FIRST_ROWS", 0)
    with pytest.raises(DatasetError, match="There are no images in split 'train' of the data set"):
        preview_images(spec, tmp_path / "cache")


def test_a_preview_of_a_slice_judges_no_rows_that_are_not_in_it(parquet: Path, tmp_path: Path) -> None:
    settings = {"caption_column": "text", "label_column": "unknown", "split": "train[2:]"}
    assert load(parquet, tmp_path, "hub", **settings).labels == [1, 1, 0]
    spec = spec_of(parquet, "hub", **settings)
    assert preview_images(spec, tmp_path / "cache") == Preview(None, is_looked_at=False)
    with pytest.raises(DatasetError, match=r"has the splits train, and no 'dev\[2:\]'; set dataset\.split"):
        preview_images(spec.model_copy(update={"split": "dev[2:]"}), tmp_path / "cache")


def test_captions_are_told_from_imagenets_ids_by_the_first(folder: Path, tmp_path: Path) -> None:
    class Counted(list[str | None]):
        num_read = 0

        def __iter__(self) -> Iterator[str | None]:
            for value in super().__iter__():
                self.num_read += 1
                yield value

    spec = spec_of(folder, caption_column="text")
    for values, captions in (
        ([None, *(f"picture {number}" for number in range(9))], None),
        ([None, "n01440764", *["a cat"] * 8], None),
        (["n01440764"] * 10, ["tench"] * 10),
    ):
        column = Column(Counted(values))
        source = SimpleNamespace(description="here", columns=["text"], column=lambda _, found=column: found, name=str)
        found = read_conditioning(cast(Any, source), spec, range(1, 10)).captions
        assert found == (captions or values)[1:]
        assert (column.values.num_read == 2) == (values[1] == "picture 0")


def test_nothing_is_read_unless_asked_for(parquet: Path, tmp_path: Path) -> None:
    dataset = load(parquet, tmp_path, "hub")
    assert (dataset.captions, dataset.labels) == (None, None)
    (batch,) = first(1, dataset)
    assert (batch.captions, batch.labels) == (None, None)


def test_a_subset_keeps_captions_and_labels_beside_their_images(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder, tmp_path, caption_template="{label}", label_column="label")
    for part in split_heldout(dataset, 2):
        assert part.captions is not None
        assert part.labels is not None
        for index in range(len(part)):
            same = [i for i in range(5) if torch.equal(dataset.image(i), part.image(index))]
            assert [dataset.captions[i] for i in same] == [part.captions[index]]
            assert [dataset.labels[i] for i in same] == [part.labels[index]]


def test_images_that_are_skipped_take_their_captions_and_labels_along(folder: Path, tmp_path: Path) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": name}) for name in names))
    (folder / names[0]).write_bytes(b"no image")
    for captions in ({"caption_column": "text"}, {"caption_template": "{text}"}):
        dataset = load(folder, tmp_path, **captions, label_column="label", skip_broken=True)
        assert (dataset.captions, dataset.labels) == (names[1:], [0, 1, 1, 2])


# What the user can do wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_column": "caption"}, "Column 'caption' is not in .*, which has text, some, kind, .*caption_column"),
        ({"label_column": "class"}, r"Column 'class' is not in .*label_column\.$"),
        ({"caption_template": "{title}"}, r"Column 'title' is not in .*caption_template\.$"),
        (
            {"caption_column": "some"},
            r"^4 of 5 images in .* have no caption in column 'some' \(row 1, row 2, row 3, …\)",
        ),
        ({"caption_column": "some", "num_images": 2}, r"^1 of 2 images .* \(row 1\)"),
        ({"caption_template": "{unknown}"}, r"^1 of 5 images .* no value in column 'unknown', which .*_template uses"),
        ({"label_column": "unknown"}, r"^1 of 5 images in .* have no label in column 'unknown' \(row 1\)"),
        ({"caption_column": "number"}, "'number' of .* holds values such as 7, not texts; set dataset.caption_column"),
        ({"caption_column": "texts"}, r"'texts' of .* holds values such as \['a', 'b'\], not texts"),
        ({"label_column": "score"}, "'score' of .* holds values such as 0.5, neither classes nor their names"),
    ],
)
def test_columns_that_cannot_be_used_are_named(
    parquet: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    uses = (
        lambda: load(parquet, tmp_path, "hub", **settings),
        lambda: preview_images(spec_of(parquet, "hub", **settings), tmp_path / "cache"),
    )
    for use in uses:
        with pytest.raises(DatasetError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_images_in_no_subfolder_have_no_label(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "cat" / "0.png").rename(folder / "0.png")
    with pytest.raises(DatasetError, match=r"^1 of 5 images .* no label in column 'label' \(0.png\)"):
        load(folder, tmp_path, label_column="label")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_column": "a", "caption_template": "b"}, "either caption_column or caption_template"),
        ({"caption_dropout": 0.1}, "caption_dropout needs caption_column"),
        ({"caption_template": "a {label"}, "malformed"),
        ({"caption_template": "a {}"}, "names of columns"),
        ({"caption_template": "a {label!r}"}, "names of columns"),
        ({"caption_template": "a {label:>9}"}, "names of columns"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DatasetSpec(source="digits", **settings)


# Fingerprints


def test_captions_and_labels_are_part_of_the_identity_only_if_asked_for(folder: Path, tmp_path: Path) -> None:
    def of(**settings: object) -> tuple[str, str, str]:
        dataset = load(folder, tmp_path, **settings)
        return dataset.fingerprint, dataset.example_fingerprint, dataset.reference_fingerprint

    plain = of()
    assert plain[1] == plain[2]
    captioned, labelled = of(caption_template="a {label}"), of(label_column="label")
    dropping = of(caption_template="a {label}", caption_dropout=0.1)
    assert {each[2] for each in (plain, captioned, labelled, dropping)} == {plain[2]}
    assert len({each[1] for each in (plain, captioned, labelled, of(caption_template="the {label}"))}) == 4
    assert dropping[1] == captioned[1]
    assert len({each[0] for each in (plain, captioned, labelled, dropping)}) == 4
    (folder / "train" / "frog").rename(folder / "train" / "toad")
    assert of() == plain
    assert of(caption_template="a {label}")[1] != captioned[1]


# Batches


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_pair_images_with_captions_and_labels(
    folder: Path, tmp_path: Path, random_crop: bool, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load(folder, tmp_path, caption_template="{label}", label_column="label")
    if num_workers:
        monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", 0)
    assert dataset.labels is not None
    label_of_size = {dataset.resized(index).original_size: dataset.labels[index] for index in range(5)}
    for batch in first(5, dataset, random_crop=random_crop, num_workers=num_workers):
        assert (len(batch), batch.clean_images.shape) == (4, (4, 3, 16, 16))
        assert batch.sizes is not None
        assert batch.labels is not None
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == [label_of_size[tuple(size)] for size in batch.sizes.original_sizes.tolist()]
        assert batch.captions == tuple(("cat", "dog", "frog")[label] for label in batch.labels.tolist())


def test_sizes_say_where_in_the_mirrored_or_plain_image_the_square_lies(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder, tmp_path)
    by_size = {dataset.resized(index).original_size: dataset.resized(index).pixels for index in range(5)}
    assert set(by_size) == {(16 + 3 * number, 30) for number in range(5)}
    num_mirrored = 0
    for random_crop in (False, True):
        for batch in first(8, dataset, random_crop=random_crop, random_flip=True):
            assert batch.sizes is not None
            sizes = (batch.sizes.original_sizes, batch.sizes.crop_top_lefts, batch.sizes.target_sizes)
            for image, *(size, corner, target) in zip(batch.clean_images, *sizes, strict=True):
                assert target.tolist() == [16, 16]
                resized = by_size[tuple(size.tolist())].float() / 127.5 - 1
                top, left = corner.tolist()
                plain, mirrored = (
                    torch.allclose(whole[:, top : top + 16, left : left + 16], image, atol=1e-6)
                    for whole in (resized, resized.flip(-1))
                )
                assert plain != mirrored
                num_mirrored += mirrored
    assert 16 < num_mirrored < 48


def test_captions_are_dropped_at_the_rate_asked_for_and_alike_after_a_resume(tmp_path: Path) -> None:
    spec = DatasetSpec(source="digits", caption_template="{label}", label_column="label", num_images=300)
    dataset = load_images(spec, cache=tmp_path)

    def captions(**settings: Any) -> list[tuple[str, ...] | None]:
        return [batch.captions for batch in first(20, dataset, batch_size=64, **settings)]

    plain, dropped = captions(), captions(caption_dropout=0.3)
    pairs = [(a, b) for x, y in zip(plain, dropped, strict=True) for a, b in zip(x or (), y or (), strict=True)]
    assert all(b in (a, "") for a, b in pairs)
    assert 0.25 < sum(b == "" for _, b in pairs) / len(pairs) < 0.35
    resumed = first(6, dataset, batch_size=64, caption_dropout=0.3, start_batch=14)
    assert [batch.captions for batch in resumed] == dropped[14:]
    assert captions(caption_dropout=1.0) == [("",) * 64] * 20
    with_dropout, without = first(3, dataset, caption_dropout=0.5), first(3, dataset)
    assert all(torch.equal(a.clean_images, b.clean_images) for a, b in zip(with_dropout, without, strict=True))


def test_captions_and_labels_are_dropped_together(tmp_path: Path) -> None:
    spec = DatasetSpec(source="digits", caption_template="{label}", label_column="label", num_images=50)
    dataset = load_images(spec, cache=tmp_path)
    for batch in first(5, dataset, batch_size=16, caption_dropout=0.5):
        assert batch.labels is not None
        assert batch.captions == tuple("" if label == -1 else str(label) for label in batch.labels.tolist())
        assert 0 < (batch.labels == -1).sum() < 16
