import itertools
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deme_core.errors import DatasetError
from deme_core.images import ImageDataset, load_images
from deme_core.recipe import DatasetSpec

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg" / "test.tar.xz"
NAMES = ("a/0.png", "a/1.png", "b/0.png", "top.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, with metadata for one sub-folder and for the rest."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    write(
        tmp_path / "images",
        {"file_name": "top.png", "text": "line\u2028separated", "label": 7},
        {"file_name": "./b/0.png", "text": " bee ", "mood": "calm"},
    )
    write(tmp_path / "images" / "a", {"file_name": "1.png", "text": "one"}, {"file_name": "0.png", "text": "zero"})
    return tmp_path / "images"


def write(folder: Path, *rows: dict[str, Any]) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_text(text + "\n\n", "utf-8")


def load(path: Path | str, tmp_path: Path, **settings: object) -> ImageDataset:
    spec = {"source": "imagefolder", "resolution": 8, "path": str(path), **settings}
    return load_images(DatasetSpec.model_validate(spec), cache=tmp_path / "cache")


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, file.relative_to(folder))
    return path


def test_metadata_gives_captions_in_a_folder_a_zip_and_a_store_prefix(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "store" / "set")
    local = load(folder, tmp_path, caption_column="text")
    assert local.captions == ["zero", "one", "bee", "line\u2028separated"]
    for path in (zipped(folder, tmp_path / "images.zip"), (tmp_path / "store" / "set").as_uri()):
        assert load(path, tmp_path, caption_column="text").fingerprint == local.fingerprint


def test_metadata_says_the_label_before_the_subfolder_does(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"^3 of 4 images .* no label in column 'label' \(a/0.png, a/1.png, b/0.png\)"
    ):
        load(folder, tmp_path, label_column="label")
    (folder / "metadata.jsonl").unlink()
    (folder / "top.png").unlink()
    assert load(folder, tmp_path, label_column="label").labels == [0, 0, 1]


def test_metadata_is_not_read_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    plain = load(folder, tmp_path).fingerprint
    (folder / "metadata.jsonl").write_text("no JSON")
    assert load(folder, tmp_path).fingerprint == plain


def test_images_without_a_caption_are_counted_and_named(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "metadata.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"^2 of 4 images in the folder .* column 'text' \(a/0.png, a/1.png\); give"):
        load(folder, tmp_path, caption_column="text")
    with pytest.raises(DatasetError, match=r"Column 'caption' is not in .*, which has label, text, mood; set"):
        load(folder, tmp_path, caption_column="caption")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"file_name": "top.png"}\n{"file_name": "b/0.png", text: 1}',
            r"^metadata.jsonl in the (folder|zip) .* is no JSON lines \(line 2: ",
        ),
        (b'{"file_name": "top.png", "text": "\xff"}', r"is no JSON lines \(line 1: not UTF-8\)"),
        (b'{"file_name": "top.png", "text": ' + b"[" * 100_000, r"is no JSON lines \(line 1: nested too deeply\)"),
        (b'[{"file_name": "top.png", "text": "a"}]', "has in line 1 no JSON object with a text file_name"),
        (b'{"file": "top.png", "text": "a"}', "has in line 1 no JSON object with a text file_name"),
        (b'{"file_name": "top.png"}\n{"file_name": "b/../top.png"}', "has in line 2 another row of top.png"),
        (
            b"\n".join(b'{"file_name": "%d.png"}' % number for number in range(5)),
            r"names 5 images that are not there \(0.png, 1.png, 2.png, …\); add the files, or remove their lines",
        ),
        (b'{"file_name": "../outside.png"}', r"names 1 images that are not there \(../outside.png\)"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(folder: Path, tmp_path: Path, content: bytes, message: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (folder / "metadata.jsonl").write_bytes(content)
    for path in (folder, zipped(folder, tmp_path / "images.zip")):
        with pytest.raises(DatasetError, match=message) as caught:
            load(path, tmp_path, caption_column="text")
        assert "\n" not in str(caught.value)


def test_labels_are_classes_or_names_and_not_both(folder: Path, tmp_path: Path) -> None:
    rows = [{"file_name": "top.png", "kind": 1}, {"file_name": "b/0.png", "kind": "cat"}]
    write(folder, *rows)
    with pytest.raises(DatasetError, match=r"^Column 'kind' of the folder .* holds both classes and names; set"):
        load(folder, tmp_path, label_column="kind")


def test_names_of_classes_are_numbered_in_their_own_order(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "metadata.jsonl").unlink()
    kinds = dict(zip(NAMES, ("zebra", "ant", "zebra", "bee"), strict=True))
    write(folder, *({"file_name": name, "kind": kind} for name, kind in kinds.items()))
    dataset = load(folder, tmp_path, label_column="kind")
    assert dataset.labels == [2, 0, 2, 1]


@pytest.mark.skipif(not CIFAR.exists(), reason="needs shared/data beside the checkout")
def test_photographs_are_captioned_by_class(tmp_path: Path) -> None:
    with tarfile.open(CIFAR) as archive:
        members = [member for member in archive if member.isfile() and member.name.endswith("1.jpg")]
        by_class = itertools.groupby(members, key=lambda member: member.name.split("/")[1])
        chosen = [member for _, group in by_class for member in itertools.islice(group, 2)]
        archive.extractall(tmp_path / "cifar", chosen, filter="data")
    dataset = load(tmp_path / "cifar", tmp_path, caption_template="a photo of a {label}", label_column="label")
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert dataset.labels == [label for label in range(10) for _ in range(2)]
    assert dataset.captions == [f"a photo of a {name}" for name in classes for _ in range(2)]
