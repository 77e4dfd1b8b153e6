import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deme_core.errors import DatasetError
from deme_core.images import ImageDataset, TrainingBatches, batches, load_images
from deme_core.recipe import DatasetSpec


def image(number: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pack(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def sample(number: int, key: str | None = None) -> dict[str, bytes]:
    key = key or f"{number:04d}"
    content = {"caption": f"picture {number}", "label": number % 3, "ünï": [1]}
    return {
        f"{key}.png": image(number),
        f"{key}.txt": f"text {number}\n".encode(),
        f"{key}.cls": str(10 + number).encode(),
        f"{key}.json": json.dumps(content).encode(),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five samples in two tars, packed in no order."""
    pack(tmp_path / "tars" / "b.tar", sample(3) | sample(4))
    pack(tmp_path / "tars" / "a.tar", sample(2) | sample(0) | {"README": b"notes"} | sample(1) | {"8.txt": b"alone"})
    return tmp_path / "tars"


def load(path: Path | str, tmp_path: Path, **settings: object) -> ImageDataset:
    spec = {"source": "webdataset", "resolution": 8, "path": str(path), **settings}
    return load_images(DatasetSpec.model_validate(spec), cache=tmp_path / "cache")


def test_samples_come_in_the_order_of_tars_and_members(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder, tmp_path, caption_column="txt", label_column="cls")
    assert dataset.captions == [f"text {number}" for number in (2, 0, 1, 3, 4)]
    assert dataset.labels == [12, 10, 11, 13, 14]
    for index, number in enumerate((2, 0, 1, 3, 4)):
        assert dataset.resized(index).original_size == (8, 8 + number)
        expected = np.array(Image.open(io.BytesIO(image(number))))
        assert np.array_equal(dataset.resized(index).pixels.permute(1, 2, 0).numpy(), expected)


def test_json_keys_and_folders_are_columns_too(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder / "b.tar", tmp_path, caption_column="caption", label_column="label")
    assert (dataset.captions, dataset.labels) == (["picture 3", "picture 4"], [0, 1])
    members = {name: content for number in (0, 1) for name, content in sample(number, f"{'ba'[number]}/x").items()}
    plain = pack(tmp_path / "plain.tar", {name: members[name] for name in members if not name.endswith("json")})
    dataset = load(plain, tmp_path, caption_template="{label}", label_column="label")
    assert (dataset.captions, dataset.labels) == (["b", "a"], [1, 0])


def test_tars_hold_the_same_images_as_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index, number in enumerate((2, 0, 1, 3, 4)):
        (tmp_path / "images" / f"{index}.png").write_bytes(image(number))
    spec = DatasetSpec(source="imagefolder", path=str(tmp_path / "images"), resolution=8)
    images = load_images(spec, cache=tmp_path / "cache")
    assert load(folder, tmp_path).fingerprint == images.fingerprint


def test_a_store_prefix_and_one_tar_of_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "store" / "tars")
    for name in ("tars", "tars/a.tar"):
        local, stored = folder.parent / name, (tmp_path / "store" / name).as_uri()
        expected = load(local, tmp_path, caption_column="txt")
        assert load(stored, tmp_path, caption_column="txt").fingerprint == expected.fingerprint


def test_tars_are_read_by_workers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", 0)
    dataset = load(folder, tmp_path, caption_column="txt")

    def first(num_workers: int) -> list[tuple[torch.Tensor, tuple[str, ...] | None]]:
        stream = TrainingBatches(
            dataset, batch_size=3, seed=1, random_crop=True, random_flip=True, num_workers=num_workers
        )
        return [(batch.clean_images, batch.captions) for batch in itertools.islice(stream, 6)]

    for (images, captions), (expected_images, expected_captions) in zip(first(2), first(0), strict=True):
        assert torch.equal(images, expected_images)
        assert captions == expected_captions


def test_names_are_taken_as_webdataset_takes_them(tmp_path: Path) -> None:
    members = {
        "./d.1/x.PNG": image(0),
        "./d.1/x.seg.png": image(1),
        "./d.1/x.txt": b"x",
        "._x.png": b"mac",
        ".hidden/y.png": b"hidden",
    }
    dataset = load(pack(tmp_path / "a.tar", members, "w:"), tmp_path, caption_column="txt")
    assert (len(dataset), dataset.captions) == (1, ["x"])
    assert load(tmp_path / "a.tar", tmp_path, image_column="seg.png").resized(0).original_size == (8, 9)


@pytest.mark.parametrize("name", ["k" * 150 + ".png", "d" * 90 + "/" + "é" * 60 + ".png"])
def test_long_names_in_every_tar_format(tmp_path: Path, name: str) -> None:
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=kind) as archive:
            info = tarfile.TarInfo(name)
            info.size = len(image(0))
            archive.addfile(info, io.BytesIO(image(0)))
        assert load(tmp_path / f"{number}.tar", tmp_path).resized(0).original_size == (8, 8)


def test_tars_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    whole = (folder / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:9000])
    (tmp_path / "text.tar").write_bytes(b"text" * 1000)
    for path, message in [
        (tmp_path / "nowhere", "There is no folder or tar"),
        (tmp_path / "empty", "There is no .tar at"),
        (tmp_path / "cut.tar", "Cannot read the tar .*cut.tar"),
        (tmp_path / "text.tar", "it is damaged, compressed or no tar"),
        (pack(tmp_path / "x.tar.gz", sample(0), "w:gz"), "give a whole, uncompressed tar"),
        (
            pack(tmp_path / "two.tar", {"a.png": image(0), "a.jpg": image(1, "jpeg")}),
            r"several images .* a \(png, jpg\)",
        ),
        (pack(tmp_path / "none.tar", {"a.txt": b"a"}), "There is no image in the tar"),
        (pack(tmp_path / "broken.tar", {"a.png": b"text"}), r"^broken.tar/a.png \(not an image\)"),
    ]:
        with pytest.raises(DatasetError, match=message) as caught:
            load(path, tmp_path)
        assert "\n" not in str(caught.value)
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DatasetError, match=r"two members a\.png"):
        load(tmp_path / "twice.tar", tmp_path)


def header(name: str, kind: bytes, size: bytes) -> bytes:
    """A header whose field of the size is given, 12 bytes."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[148:156], block[156:157] = size, b" " * 8, kind
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: bytes) -> bytes:
    return header("pax", tarfile.XHDTYPE, b"%011o\0" % len(records)) + records.ljust(512, b"\0")


SIZES = {f"2^{bits}": b"\x80" + (2**bits).to_bytes(11) for bits in (40, 62, 70)}
SIZES |= {f"-{size}": b"\xff" + (256**11 - size).to_bytes(11) for size in (512, 2**70)}
RECORDS = [b"9" * 23 + b" a=b\n", b"13 size=-512\n", b"20 GNU.sparse.map=x\n"]
RECORDS += [b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"]


@pytest.mark.parametrize(
    "hostile",
    [
        *(
            pytest.param(header("b.png", kind, field), id=f"{kind.decode()} of {size}")
            for kind in (b"0", b"x", b"g", b"X", b"L", b"K")
            for size, field in SIZES.items()
        ),
        *(pytest.param(pax(records), id=records[:24].decode().strip()) for records in RECORDS),
        pytest.param(pax(b"12 path=a.b\n") * 3000, id="3000 pax headers"),
    ],
)
def test_a_tar_with_a_hostile_header_is_named(tmp_path: Path, hostile: bytes) -> None:
    sound = header("a.png", b"0", b"%011o\0" % 0)
    (tmp_path / "a.tar").write_bytes(sound + hostile + header("c.png", b"0", b"%011o\0" % 512) + bytes(2048))
    with pytest.raises(DatasetError, match=r"^Cannot read the tar .*a\.tar \(.*\); give a whole") as caught:
        load(tmp_path / "a.tar", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "settings", "message"),
    [
        (
            sample(0),
            {"caption_column": "title"},
            "'title' is not in the tar .*, which has txt, cls, caption, label, ünï;",
        ),
        (sample(0) | {"1.png": image(1)}, {"caption_column": "txt"}, r"^1 of 2 images .*'txt' \(a.tar/1.png\)"),
        (sample(0) | {"0000.cls": b"cat"}, {"label_column": "cls"}, "a.tar/0000.cls is no whole number"),
        (sample(0) | {"0000.txt": b"\xff"}, {"caption_column": "txt"}, "a.tar/0000.txt is not UTF-8"),
        (sample(0) | {"0000.json": b"{"}, {"caption_column": "caption"}, "a.tar/0000.json is no JSON"),
        (
            sample(0) | {"0000.json": b"[" * 100_000},
            {"caption_column": "caption"},
            "a.tar/0000.json is nested too deeply; pack",
        ),
        (sample(0) | {"0000.cls": b"1" * 30}, {"label_column": "cls"}, "such as 1{30}, too large for a class"),
    ],
)
def test_columns_that_cannot_be_used_are_named(
    tmp_path: Path, members: dict[str, bytes], settings: dict[str, str], message: str
) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        load(pack(tmp_path / "a.tar", members), tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_a_tar_that_is_cut_during_the_run_is_named(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder / "a.tar", tmp_path)
    whole = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(whole[:100])
    with pytest.raises(DatasetError, match="was cut short"):
        dataset.image(0)
