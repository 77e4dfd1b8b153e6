import io
import itertools
import os
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps

from deme_core.errors import DatasetError, InputError
from deme_core.images import (
    CropsInMemory,
    ImageDataset,
    TrainingBatches,
    archive,
    batches,
    load_images,
    normalize,
    opening,
    source,
)
from deme_core.images.digits import DigitsSource
from deme_core.images.draws import BatchSchedule
from deme_core.images.pixels import FORMATS, decode
from deme_core.images.preview import preview_images
from deme_core.images.remote import FileKind, fetch_images
from deme_core.recipe import DatasetSpec

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg" / "test.tar.xz"
SIZES = [(32, 24), (24, 32), (17, 40), (16, 16), (9, 9), (40, 17), (33, 32)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images of all shapes and kinds, in two sub-folders."""
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}{('.png', '.jpg', '.webp')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def load(path: Path | str, tmp_path: Path, **settings: object) -> ImageDataset:
    spec = {"source": "imagefolder", "resolution": 16, "path": str(path), **settings}
    return load_images(DatasetSpec.model_validate(spec), cache=tmp_path / "cache")


def pixels_of(dataset: ImageDataset) -> torch.Tensor:
    return torch.stack([dataset.image(index) for index in range(len(dataset))])


def first(count: int, dataset: ImageDataset, **settings: object) -> torch.Tensor:
    options = {"batch_size": 4, "seed": 3, "random_crop": False, "random_flip": False, **settings}
    return torch.stack([batch.clean_images for batch in itertools.islice(TrainingBatches(dataset, **options), count)])


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, file.relative_to(folder))
    return path


# Pixels


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])  # As which many cameras write what they call .jpg.
def test_every_kind_of_image_is_read(kind: str) -> None:
    file = io.BytesIO()
    pages = {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]} if kind == "MPO" else {}
    Image.new("RGB", (8, 8), (255, 0, 0)).save(file, kind, **pages)
    read = np.array(decode(file.getvalue(), channels=3)).astype(int)
    assert read.shape == (8, 8, 3) and np.abs(read - (255, 0, 0)).max() <= 1


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that shows that Ghostscript was run."""
    program, shown = tmp_path / "gs", tmp_path / "gs-was-run"
    program.write_text(f"#!/bin/sh\ntouch {shown}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", str(program))
    return shown


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_is_not_run_whatever_a_file_is_called(tmp_path: Path, ghostscript: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(POSTSCRIPT)
    with pytest.raises(DatasetError, match=r"^0.png \(not an image\)"):
        load(tmp_path / "images", tmp_path)
    assert not ghostscript.exists()


def test_a_column_that_is_no_text_but_images_is_not_decoded(
    folder: Path, parquet: Path, tmp_path: Path, ghostscript: Path
) -> None:
    import datasets

    rows = {"image": [(folder / "a" / "0.png").read_bytes()], "text": [POSTSCRIPT]}
    table = datasets.Dataset.from_dict({name: [{"bytes": cell, "path": None} for cell in rows[name]] for name in rows})
    for name in rows:
        table = table.cast_column(name, datasets.Image())
    table.to_parquet(parquet / "train.parquet")
    with pytest.raises(DatasetError, match=r"Column 'text' .*, not texts"):
        load(parquet, tmp_path, source="hub", caption_column="text")
    assert not ghostscript.exists()


@pytest.mark.parametrize("size", [(1, 101), (101, 1)])
def test_a_line_of_pixels_is_broken(folder: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", (3, 300)).save(folder / "long.png")
    assert load(folder, tmp_path).image(7).shape == (3, 16, 16)
    Image.new("RGB", size).save(folder / "line.png")
    with pytest.raises(DatasetError, match=rf"^line.png \({size[0]}×{size[1]} pixels are longer than 100 to 1\)"):
        load(folder, tmp_path)


def test_digits_are_scaled_from_sixteen_levels(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    dataset = load_images(DatasetSpec(source="digits"), cache=tmp_path)
    assert (len(dataset), dataset.channels, dataset.resolution) == (1797, 1, 8)
    expected = torch.tensor(load_digits().images).mul(255 / 16).round().to(torch.uint8)
    assert torch.equal(pixels_of(dataset), expected[:, None])


def test_digits_do_without_scikit_learns_file(monkeypatch: pytest.MonkeyPatch) -> None:
    of_the_file = DigitsSource()
    monkeypatch.setattr("deme_core.images.digits.importlib.util.find_spec", lambda _: None)
    loaded = DigitsSource()
    assert [loaded.read(i) for i in range(1797)] == [of_the_file.read(i) for i in range(1797)]
    assert loaded.column("label") == of_the_file.column("label")


def test_digits_take_another_resolution_and_channels(tmp_path: Path) -> None:
    dataset = load_images(DatasetSpec(source="digits", resolution=12, channels=3, num_images=5), cache=tmp_path)
    images = pixels_of(dataset)
    assert images.shape == (5, 3, 12, 12)
    assert images.dtype == torch.uint8
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("channels", [1, 3])
def test_center_crop_equals_the_transforms_of_diffusers_example(folder: Path, tmp_path: Path, channels: int) -> None:
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.Resize(16, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    Image.effect_noise((16, 19), 50).save(folder / "three-to-cut.png")
    dataset = load(folder, tmp_path, channels=channels)
    files = sorted(folder.rglob("*.*"), key=lambda path: path.relative_to(folder).as_posix())
    for index, file in enumerate(files):
        expected = transform(Image.open(file).convert({1: "L", 3: "RGB"}[channels]))
        assert torch.equal(normalize(dataset.image(index)), expected)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    (tmp_path / "grey").mkdir()
    Image.fromarray(values).save(tmp_path / "grey" / "0.png")
    image = load(tmp_path / "grey", tmp_path, channels=1).image(0)
    assert np.array_equal(image[0].numpy(), np.round(values / 257).astype(np.uint8))


def test_orientation_is_applied(tmp_path: Path) -> None:
    (tmp_path / "turned").mkdir()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned" / "0.png", exif=exif)
    turned = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "turned" / "0.png")))
    assert not np.array_equal(turned, np.array(image))
    assert np.array_equal(load(tmp_path / "turned", tmp_path).image(0).permute(1, 2, 0).numpy(), turned)


# Fingerprints


def test_fingerprint_never_changes_between_releases(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.ppm").write_bytes(b"P6 4 4 255\n" + bytes(range(48)))
    dataset = load(tmp_path / "one", tmp_path, resolution=4)
    assert dataset.fingerprint == "c6c6299d76dab5daec7c182a3bb6c33f39e59177aec516ae1927e6635ec5dae8"


def test_fingerprint_knows_what_changes_the_pixels(folder: Path, tmp_path: Path) -> None:
    def fingerprints(**settings: object) -> tuple[str, str]:
        dataset = load(folder, tmp_path, **settings)
        return dataset.fingerprint, dataset.reference_fingerprint

    original = fingerprints()
    assert fingerprints() == original
    others = [fingerprints(resolution=8), fingerprints(channels=1), fingerprints(num_images=6)]
    (folder / "a" / "0.png").rename(folder / "a" / "9.png")
    others.append(fingerprints())
    (folder / "a" / "9.png").rename(folder / "a" / "0.png")
    assert fingerprints() == original
    image = Image.open(folder / "a" / "0.png")
    image.putpixel((3, 3), (1, 2, 3))
    image.save(folder / "a" / "0.png")
    others.append(fingerprints())
    for kind in (0, 1):
        assert len({pair[kind] for pair in [original, *others]}) == len(others) + 1


def test_augmentation_changes_the_fingerprint_but_not_the_reference(folder: Path, tmp_path: Path) -> None:
    plain, *others = [
        load(folder, tmp_path, **settings) for settings in ({}, {"crop": "random"}, {"random_flip": True})
    ]
    assert len({plain.fingerprint, *(o.fingerprint for o in others)}) == 3
    assert {o.reference_fingerprint for o in others} == {plain.reference_fingerprint}
    assert all(torch.equal(pixels_of(plain), pixels_of(o)) for o in others)


def test_inspection_is_remembered_until_a_file_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "SETTLED_AFTER_SEC", -1.0)
    before = load(folder, tmp_path, num_images=2).fingerprint
    (record,) = (tmp_path / "cache" / "images" / "inspected").iterdir()
    assert len(record.read_text().splitlines()) == 2
    whole = load(folder, tmp_path)
    assert len(record.read_text().splitlines()) == len(SIZES)
    lines = record.read_text().splitlines()
    record.write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    assert load(folder, tmp_path).fingerprint != whole.fingerprint
    status = (folder / "a" / "0.png").stat()
    os.utime(folder / "a" / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load(folder, tmp_path).fingerprint == whole.fingerprint
    assert load(folder, tmp_path, num_images=2).fingerprint == before


def test_inspection_of_fresh_files_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    load(folder, tmp_path)
    assert not (tmp_path / "cache").exists()


# Sources


def test_hidden_files_are_left_out_and_links_followed_once(folder: Path, tmp_path: Path) -> None:
    expected = load(folder, tmp_path).fingerprint
    for name in (".hidden.png", "._0.png", "__MACOSX/0.png", ".cache/0.png", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    (folder / "b").rename(tmp_path / "elsewhere")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert load(folder, tmp_path).fingerprint == expected


def test_a_zip_holds_the_same_images_as_its_folder(folder: Path, tmp_path: Path) -> None:
    dataset, unpacked = load(zipped(folder, tmp_path / "images.zip"), tmp_path), load(folder, tmp_path)
    assert dataset.fingerprint == unpacked.fingerprint
    assert torch.equal(pixels_of(dataset), pixels_of(unpacked))


def test_a_zip_is_read_by_workers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", 0)
    dataset = load(zipped(folder, tmp_path / "images.zip"), tmp_path)
    assert torch.equal(first(6, dataset, num_workers=2), first(6, dataset))


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png"])
def test_a_zip_with_an_unsafe_member_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    path = zipped(folder, tmp_path / "images.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"no image")
    with pytest.raises(DatasetError, match="unsafe member"):
        load(path, tmp_path)
    assert not list(tmp_path.rglob("evil.png"))


@pytest.mark.parametrize(
    ("compression", "flags", "message"), [(zipfile.ZIP_BZIP2, 0, "compression"), (zipfile.ZIP_STORED, 1, "encrypted")]
)
def test_a_zip_of_another_kind_is_refused(tmp_path: Path, compression: int, flags: int, message: str) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("0.png", b"no image")
        archive.getinfo("0.png").flag_bits |= flags
    with pytest.raises(DatasetError, match=message):
        load(path, tmp_path)


def test_a_damaged_member_of_a_zip_is_a_broken_image(folder: Path, tmp_path: Path) -> None:
    path = zipped(folder, tmp_path / "images.zip")
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("a/0.png").header_offset + 200
    data = bytearray(path.read_bytes())
    data[offset : offset + 50] = bytes(50)
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"a/0.png \(damaged in the zip\)"):
        load(path, tmp_path)
    assert load(path, tmp_path, skip_broken=True).num_skipped == 1


@pytest.mark.parametrize("name", ["a/0.png", "metadata.jsonl"])
def test_a_member_that_inflates_beyond_any_image_is_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(archive, "_MAX_BYTES", 2**20)
    (folder / name).write_bytes(bytes(2**20 + 1))
    path = zipped(folder, tmp_path / "images.zip")
    assert path.stat().st_size < 2**17
    with pytest.raises(DatasetError, match=r"inflates? to 1048577 bytes"):
        load(path, tmp_path, caption_column="text")
    if name.endswith(".png"):
        assert load(path, tmp_path, skip_broken=True).num_skipped == 1


def test_metadata_that_inflate_together_beyond_any_are_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_MAX_BYTES", 2**20)
    for name in ("metadata.jsonl", "a/metadata.jsonl"):
        (folder / name).write_bytes(b"\n" * (2**19 + 1))
    path = zipped(folder, tmp_path / "images.zip")
    with pytest.raises(DatasetError, match=r"^The metadata in the zip .* \(inflate to 1048578 bytes\); pack it anew"):
        load(path, tmp_path, caption_column="text")
    assert len(load(path, tmp_path)) == len(SIZES)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (6, 99, "^Cannot read the zip .*damaged or no zip"),  # Version 9.9.
        (8, 0x20, r"^0.png \(packed in a way that is not read\) in the zip"),  # A patch.
        (8, 0x40, r"^0.png \(packed in a way that is not read\) in the zip"),  # Strong encryption.
        (9, 0x08, "^Cannot read the zip .*damaged or no zip"),  # The name is UTF-8, and is not.
    ],
)
def test_a_zip_with_a_hostile_header_is_named(tmp_path: Path, offset: int, value: int, message: str) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", b"no image")
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\x01\x02")
    data[entry + offset] = value
    if offset == 9:
        data[entry + 46] = 0xFF
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=message) as caught:
        load(path, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_member_that_inflates_to_more_than_it_declares_is_broken(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "0.png").write_bytes(bytes(2**20))
    path = zipped(folder, tmp_path / "images.zip")
    path.write_bytes(path.read_bytes().replace((2**20).to_bytes(4, "little"), (99).to_bytes(4, "little")))
    with pytest.raises(DatasetError, match=r"a/0.png \(damaged in the zip\)"):
        load(path, tmp_path)


def test_a_store_prefix_and_its_zip_hold_the_same_images(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(folder, store / "set one")
    shutil.copytree(folder / "a", store / "set one too")
    zipped(folder, store / "all images.zip")
    expected = load(folder, tmp_path).fingerprint
    for name in ("set one", "all images.zip"):
        uri = (store / name).as_uri()
        assert load(uri, tmp_path).fingerprint == expected
        local = fetch_images(uri, tmp_path / "cache")
        assert load(local, tmp_path).fingerprint == expected
        (victim, *_) = [local] if local.is_file() else sorted(local.rglob("*.png"))
        victim.unlink()
        assert fetch_images(uri, tmp_path / "cache") == local
        assert load(local, tmp_path).fingerprint == expected


def test_an_object_store_uri_is_fetched(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DatasetSpec(source="imagefolder", path="s3://bucket/images", resolution=16)
    asked = []

    def fetch(uri: str, cache: Path, kind: FileKind, num_files: int | None) -> Path:
        asked.append(uri)
        return folder

    monkeypatch.setattr(opening, "fetch_images", fetch)
    assert len(load_images(spec, cache=tmp_path / "cache")) == len(SIZES)
    assert asked == ["s3://bucket/images"]


def load_from_store(folder: Path, tmp_path: Path, **settings: object) -> ImageDataset:
    """What a prefix that holds the files of a folder gives."""

    def fetch(uri: str, cache: Path, kind: FileKind, num_files: int | None) -> Path:
        return fetch_images(folder.as_uri(), cache, kind, num_files)

    given = {"source": "imagefolder", "resolution": 16, "path": "s3://bucket/images", **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "fetch_images", fetch)
        return load_images(DatasetSpec.model_validate(given), cache=tmp_path / "downloaded")


def downloaded(tmp_path: Path) -> list[str]:
    """The files that were brought, of whichever version."""
    files = (tmp_path / "downloaded" / "images" / "downloads").glob("*/**/[!.]*.*")
    return sorted("/".join(path.parts[-2:]) for path in files)


def test_only_the_images_that_are_used_are_fetched(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", folder / "a-")  # Which comes before a.
    (folder / "metadata.jsonl").write_bytes(b"no metadata, which nobody reads")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*.*") if path.suffix != ".jsonl"]
    for num_images, num_files in [(2, 2), (6, 6), (3, 6), (len(names), len(names)), (2, len(names))]:
        stored, local = (load_(folder, tmp_path, num_images=num_images) for load_ in (load_from_store, load))
        assert stored.fingerprint == local.fingerprint
        assert torch.equal(pixels_of(stored), pixels_of(local))
        assert downloaded(tmp_path) == sorted(names)[:num_files]
    with pytest.raises(DatasetError, match=rf"has {len(names)}; lower it"):
        load_from_store(folder, tmp_path, num_images=len(names) + 1)


@pytest.mark.parametrize("settings", [{"label_column": "label"}, {"caption_template": "a {label}"}])
def test_all_are_fetched_where_they_decide_the_classes(
    folder: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    (folder / "a").rename(folder / "c")
    stored, local = (load_(folder, tmp_path, num_images=2, **settings) for load_ in (load_from_store, load))
    assert stored.fingerprint == local.fingerprint
    assert (stored.captions, stored.labels) == (local.captions, local.labels)
    assert len(downloaded(tmp_path)) == len(SIZES)


def test_all_are_fetched_where_broken_images_are_skipped(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "0.png").write_bytes(b"text")
    stored, local = (load_(folder, tmp_path, num_images=2, skip_broken=True) for load_ in (load_from_store, load))
    assert (stored.fingerprint, stored.num_skipped) == (local.fingerprint, 1)
    assert len(downloaded(tmp_path)) == len(SIZES)


def test_a_broken_image_among_those_fetched_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "0.png").write_bytes(b"text")
    for load_ in (load_from_store, load):
        with pytest.raises(DatasetError, match=r"^a/0.png \(not an image\) in .* cannot be decoded"):
            load_(folder, tmp_path, num_images=2)


@pytest.fixture
def parquet(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images of ``folder`` as a parquet data set."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    files = sorted(folder.rglob("*.*"), key=lambda path: path.relative_to(folder).as_posix())
    rows = {"picture": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": list(range(len(files)))}
    table = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    return tmp_path / "parquet"


def test_a_hub_data_set_holds_the_same_images_as_the_folder(folder: Path, parquet: Path, tmp_path: Path) -> None:
    dataset = load(parquet, tmp_path, source="hub", image_column="picture")
    assert dataset.fingerprint == load(folder, tmp_path).fingerprint
    part = load(parquet, tmp_path, source="hub", image_column="picture", split="train[2:4]")
    assert torch.equal(pixels_of(part), pixels_of(dataset)[2:4])


@pytest.fixture
def described(parquet: Path) -> Path:
    """The same as two splits, with what the hub says of a data set."""
    shutil.copy(parquet / "train.parquet", parquet / "test.parquet")
    count = {"num_bytes": 1, "num_examples": len(SIZES)}
    info = {"splits": [{"name": name, **count} for name in ("train", "test")]}
    (parquet / "README.md").write_text(f"---\n{yaml.safe_dump({'dataset_info': info})}---\n")
    return parquet


@pytest.mark.parametrize(
    "split",
    ["train", "train[:3]", "train[-2:]", "train[:50%]", "train[5:3]", "train+test", "train[:2]+test[1:]", "all"],
)
def test_a_preview_counts_the_rows_that_a_split_has(described: Path, tmp_path: Path, split: str) -> None:
    import datasets

    spec = DatasetSpec(source="hub", path=str(described), image_column="picture", resolution=16, split=split)
    found = preview_images(spec, tmp_path / "cache")
    assert found.num_images == len(datasets.load_dataset(str(described), split=split))


@pytest.mark.parametrize("split", ["dev", "dev[:2]", "train+dev", "train + test", "train["])
def test_a_preview_names_the_splits_that_there_are(described: Path, tmp_path: Path, split: str) -> None:
    spec = DatasetSpec(source="hub", path=str(described), image_column="picture", resolution=16, split=split)
    with pytest.raises(DatasetError, match=rf"has the splits train, test, and no '{re.escape(split)}'; set"):
        preview_images(spec, tmp_path / "cache")


def test_rows_without_an_image_are_skipped_and_remembered(
    folder: Path, parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(source, "SETTLED_AFTER_SEC", -1.0)
    images = [{"bytes": (folder / "a" / "0.png").read_bytes(), "path": "0.png"}, None]
    table = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    table.to_parquet(parquet / "train.parquet")
    with pytest.raises(DatasetError, match=r"^row 1 \(no image in this row\)"):
        load(parquet, tmp_path, source="hub")
    dataset = load(parquet, tmp_path, source="hub", skip_broken=True)
    assert (len(dataset), dataset.num_skipped) == (1, 1)
    (record,) = (tmp_path / "cache" / "images" / "inspected").iterdir()
    assert record.read_text().splitlines()[1] == "broken: no image in this row"


def test_hub_images_may_be_files_of_a_local_folder(folder: Path, parquet: Path, tmp_path: Path) -> None:
    dataset = load(folder / "a", tmp_path, source="hub")
    assert dataset.fingerprint == load(folder / "a", tmp_path).fingerprint
    (folder / "a" / "0.png").unlink()
    with pytest.raises(DatasetError, match=r"0\.png, which cannot be read"):
        dataset.image(0)


def refer(parquet: Path, *files: Path | str) -> None:
    """Writes a data set whose images are files that it only names."""
    import datasets

    table = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(file)} for file in files]})
    table.cast_column("image", datasets.Image()).to_parquet(parquet / "train.parquet")


@pytest.mark.parametrize("name", ["private.png", "parquet/../private.png", "parquet/link.png", "parquet/pipe.png"])
def test_a_row_that_names_a_file_of_the_machine_is_refused(
    folder: Path, parquet: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(folder / "a" / "0.png", tmp_path / "private.png")
    (parquet / "link.png").symlink_to(tmp_path / "private.png")
    os.mkfifo(parquet / "pipe.png")
    refer(parquet, tmp_path / name)
    with pytest.raises(DatasetError, match=r"\.png, which is no file in the data set's folder"):
        load(parquet, tmp_path, source="hub", skip_broken=True)


@pytest.mark.parametrize("place", ["parquet", "hf/downloads/extracted", "hub/snapshots"])
def test_a_row_may_name_a_file_of_the_data_set_or_of_a_cache(
    folder: Path, parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / "hub" / "blobs").mkdir(parents=True, exist_ok=True)
    image = shutil.copy(folder / "a" / "0.png", tmp_path / place / "0.png")
    if place.startswith("hub"):  # As its client keeps files.
        image.rename(tmp_path / "hub" / "blobs" / "0")
        image.symlink_to(tmp_path / "hub" / "blobs" / "0")
    refer(parquet, image)
    assert len(load(parquet, tmp_path, source="hub")) == 1


@pytest.mark.parametrize("split", ["train", "all"])
@pytest.mark.parametrize(
    "name",
    ["{tmp}/private.parquet", "../private.parquet", "{tmp}/parquet/link.parquet", "file://{tmp}/private.parquet"],
)
def test_a_readme_that_names_a_file_of_the_machine_is_refused(
    parquet: Path, tmp_path: Path, name: str, split: str
) -> None:
    shutil.copy(parquet / "train.parquet", tmp_path / "private.parquet")
    (parquet / "link.parquet").symlink_to(tmp_path / "private.parquet")
    write_readme(parquet, name.format(tmp=tmp_path))
    spec = DatasetSpec(source="hub", path=str(parquet), image_column="picture", resolution=16, split=split)
    for use in (lambda: load_images(spec, cache=tmp_path / "cache"), lambda: preview_images(spec, tmp_path / "cache")):
        with pytest.raises(DatasetError, match=r"^The data set .*/parquet names data files that are not in it \(/"):
            use()


def test_a_readme_may_name_files_of_the_data_set(folder: Path, parquet: Path, tmp_path: Path) -> None:
    write_readme(parquet, "train.*")
    assert len(load(parquet, tmp_path, source="hub", image_column="picture")) == len(SIZES)


def write_readme(parquet: Path, data_files: str) -> None:
    """Writes which files a data set has its rows from."""
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": data_files}]}]
    (parquet / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "image"}, "Column 'image' is not in .* which has picture, label"),
        ({"image_column": "label"}, "Column 'label' .* holds no images"),
        ({"image_column": "picture", "split": "test"}, "Cannot load split 'test'|splits train, and no 'test'"),
        ({"path": "no-such-folder/at/all"}, "Cannot load split 'train'"),
        ({"file": "train.parquet"}, r"train\.parquet is a file, and source hub takes folders; set dataset\.path to"),
        ({"file": "state.json"}, "was written by save_to_disk; load it by load_from_disk, and write it by to_parquet"),
    ],
)
def test_a_hub_data_set_that_cannot_be_used_is_named(
    parquet: Path, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    settings = {"path": str(parquet)} | settings
    if (file := settings.pop("file", "")) == "state.json":
        (parquet / file).write_text("{}")
    elif file:
        settings["path"] = str(next(parquet.glob("*.parquet")))
    spec = DatasetSpec.model_validate({"source": "hub", "resolution": 16} | settings)
    for use in (load_images, preview_images):
        with pytest.raises(DatasetError, match=message) as caught:
            use(spec, cache=tmp_path / "cache")
        assert "\n" not in str(caught.value)


# What the user can do wrong


def test_a_missing_or_unsuitable_path_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "images.tar").write_bytes(b"")
    (tmp_path / "images.zip").write_bytes(b"no zip")
    for path, message in [
        (tmp_path / "nowhere", "no folder or zip"),
        (tmp_path / "empty", "There is no image in"),
        (tmp_path / "images.tar", "neither a folder nor a zip"),
        (tmp_path / "images.zip", "damaged or no zip"),
        ("https://example.org/images", "must be a folder"),
        ("file://images", "must be a folder"),
    ]:
        with pytest.raises(DatasetError, match=message):
            load(path, tmp_path)


@pytest.mark.parametrize(("kind", "what"), [("imagefolder", "zip"), ("webdataset", "tar")])
def test_a_relative_path_that_is_missing_is_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError) as caught:
        load("coco/train2014", tmp_path, source=kind)
    assert str(caught.value).startswith(f"There is no folder or {what} {tmp_path}/coco/train2014; check dataset.path")


def test_too_few_images_are_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"num_images is 8 but the folder .* has 7; lower it"):
        load(folder, tmp_path, num_images=8)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "damaged"])
def test_a_broken_image_is_named_or_skipped(folder: Path, tmp_path: Path, damage: str) -> None:
    victim = folder / "a" / "0.png"
    data = victim.read_bytes()
    reversed_middle = data[:100] + data[100:900][::-1] + data[900:]
    victim.write_bytes({"empty": b"", "text": b"text", "truncated": data[:-500], "damaged": reversed_middle}[damage])
    with pytest.raises(DatasetError, match=r"^a/0.png \(.*skip_broken: true\.$") as caught:
        load(folder, tmp_path)
    assert "0x" not in str(caught.value)
    dataset = load(folder, tmp_path, skip_broken=True)
    assert (len(dataset), dataset.num_skipped) == (len(SIZES) - 1, 1)
    assert len(load(folder, tmp_path, skip_broken=True, num_images=6)) == 6
    with pytest.raises(DatasetError, match="has 6; lower it"):
        load(folder, tmp_path, skip_broken=True, num_images=7)


def test_only_broken_images_are_an_error_even_when_skipped(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"text")
    with pytest.raises(DatasetError, match="None of the 1 images"):
        load(tmp_path / "bad", tmp_path, skip_broken=True)


def test_a_file_that_cannot_be_read_is_never_skipped(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "0.png").unlink()
    (folder / "a" / "0.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DatasetError, match=r"Cannot read .*0\.png"):
        load(folder, tmp_path, skip_broken=True)


def test_an_image_that_breaks_during_the_run_is_named(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder, tmp_path)
    (folder / "a" / "0.png").write_bytes(b"text")
    for num_workers in (0, 2):
        with pytest.raises(DatasetError, match=r"a/0\.png .* is not what it was before \(") as caught:
            first(9, dataset, random_crop=True, num_workers=num_workers)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["imagefolder", "hub", "zip", "tar"])
def test_another_sound_image_during_the_run_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "SETTLED_AFTER_SEC", -1.0)

    def write(*colors: int) -> Path:
        for number, color in enumerate(colors):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (color, 0, 0)).save(tmp_path / "images" / f"{number}.bmp")
        if kind == "zip":
            return zipped(tmp_path / "images", tmp_path / "images.zip")
        if kind == "tar":
            with tarfile.open(tmp_path / "images.tar", "w") as tar:
                for number in range(len(colors)):
                    tar.add(tmp_path / "images" / f"{number}.bmp", f"{number}.bmp")
            return tmp_path / "images.tar"
        return tmp_path / "images"

    of = {"zip": "imagefolder", "tar": "webdataset"}.get(kind, kind)
    path = write(1, 2)
    dataset = load(path, tmp_path, source=of)
    os.utime(path)
    assert pixels_of(dataset)[:, 0, 0, 0].tolist() == [1, 2]
    write(3, 2)
    with pytest.raises(DatasetError, match=r" is not what it was before \(another image\); leave the images as they"):
        first(2, dataset, random_crop=True, num_workers=2)
    assert not any((tmp_path / "cache").rglob("*-pillow-*"))


# Batches


def test_batches_are_normalized_and_of_one_shape(folder: Path, tmp_path: Path) -> None:
    stream = first(5, load(folder, tmp_path), batch_size=3, random_crop=True, random_flip=True)
    assert stream.shape == (5, 3, 3, 16, 16)
    assert stream.dtype == torch.float32
    assert -1.0 <= stream.min() < -0.9
    assert 0.9 < stream.max() <= 1.0
    white = torch.tensor([0, 255], dtype=torch.uint8)
    assert normalize(white).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("random_crop", [False, True])
def test_a_resumed_stream_is_the_same_stream(folder: Path, tmp_path: Path, random_crop: bool) -> None:
    dataset = load(folder, tmp_path)
    options = {"random_crop": random_crop, "random_flip": True}
    whole = first(12, dataset, **options)
    assert torch.equal(first(5, dataset, start_batch=7, **options), whole[7:])
    again = TrainingBatches(dataset, batch_size=4, seed=3, start_batch=2, **options)
    assert torch.equal(next(iter(again)).clean_images, whole[2])
    assert torch.equal(next(iter(again)).clean_images, whole[2])
    assert not torch.equal(first(12, dataset, **options | {"seed": 4}), whole)


def test_the_number_of_workers_changes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(folder, tmp_path)
    options = {"random_crop": True, "random_flip": True, "start_batch": 3}
    assert torch.equal(first(8, dataset, num_workers=2, **options), first(8, dataset, **options))
    in_memory = first(8, dataset, random_flip=True)
    monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", 0)
    assert torch.equal(first(8, dataset, random_flip=True), in_memory)
    assert torch.equal(first(8, dataset, random_flip=True, num_workers=2), in_memory)


def test_what_one_stream_decoded_another_takes_from_memory(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder, tmp_path)
    kept = CropsInMemory(dataset)
    whole = first(12, dataset, random_flip=True, kept=kept)
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    assert torch.equal(first(12, dataset, random_flip=True, kept=kept), whole)
    with pytest.raises(DatasetError):
        first(12, dataset, random_flip=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_generators_are_left_alone(folder: Path, tmp_path: Path, num_workers: int) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first(2, load(folder, tmp_path), random_crop=True, random_flip=True, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_each_epoch_has_every_image_once(folder: Path, tmp_path: Path, batch_size: int) -> None:
    dataset = load(folder, tmp_path)
    expected = normalize(pixels_of(dataset))
    num_epochs = 4
    stream = first(-(-num_epochs * 7 // batch_size), dataset, batch_size=batch_size).flatten(0, 1)[: num_epochs * 7]
    positions = (stream[:, None] == expected).flatten(2).all(2).int().argmax(1).reshape(num_epochs, 7)
    assert torch.equal(stream, expected[positions.flatten()])
    assert all(sorted(epoch) == list(range(7)) for epoch in positions.tolist())
    assert len({tuple(epoch) for epoch in positions.tolist()}) > 1


def test_a_batch_does_not_copy_the_order_of_its_epoch() -> None:
    schedule = BatchSchedule(1_000_000, batch_size=4, seed=0, random_flip=True)
    schedule[0]  # Draws the order, which is kept.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        schedule[1]
    assert 0 < max(event.cpu_memory_usage for event in profile.key_averages()) < 10_000


def test_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    dataset = load_images(DatasetSpec(source="digits", num_images=300), cache=tmp_path)
    plain = first(20, dataset, batch_size=64)
    augmented = first(20, dataset, batch_size=64, random_flip=True)
    mirrored = (augmented == plain.flip(-1)).flatten(2).all(2)
    assert torch.equal(augmented, torch.where(mirrored[..., None, None, None], plain.flip(-1), plain))
    assert 0.45 < mirrored.float().mean() < 0.55


def test_random_crops_are_windows_at_every_offset(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder, tmp_path, num_images=1, resolution=12)
    resized = normalize(dataset.resized(0).pixels)
    assert min(resized.shape[1:]) == 12
    assert resized.shape[1:] != (12, 12)
    windows = resized.unfold(1, 12, 1).unfold(2, 12, 1).flatten(1, 2).transpose(0, 1)
    crops = first(40, dataset, random_crop=True).flatten(0, 1)
    hits = (crops[:, None] == windows).flatten(2).all(2)
    assert hits.any(1).all()
    assert hits.any(0).all()


def test_wrong_arguments_are_refused(folder: Path, tmp_path: Path) -> None:
    dataset = load(folder, tmp_path)
    for settings in ({"batch_size": 0}, {"start_batch": -1}, {"num_workers": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            first(1, dataset, **settings)


# Real photographs


@pytest.mark.skipif(not CIFAR.exists(), reason="needs shared/data beside the checkout")
def test_photographs_keep_their_pixels(tmp_path: Path) -> None:
    with tarfile.open(CIFAR) as archive:
        members = list(itertools.islice((member for member in archive if member.isfile()), 20))
        archive.extractall(tmp_path / "cifar", members, filter="data")
    dataset = load(tmp_path / "cifar", tmp_path, resolution=32)
    names = sorted(member.name for member in members)
    for index, name in enumerate(names):
        encoded = (tmp_path / "cifar" / name).read_bytes()
        expected = np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))
        assert np.array_equal(dataset.image(index).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("kind", ["imagefolder", "hub"])
def test_a_home_of_nobody_is_one_sentence(kind: str, tmp_path: Path) -> None:
    spec = DatasetSpec.model_validate({"source": kind, "path": "~nosuchuser/a", "resolution": 8})
    with pytest.raises(InputError, match="Cannot look for ~nosuchuser/a"):
        load_images(spec, cache=tmp_path)


def test_another_seed_orders_images_and_drops_captions_otherwise() -> None:
    first, other = (BatchSchedule(100, 50, seed, random_flip=False, caption_dropout=0.5)[0] for seed in (1, 2))
    assert not first.indices.equal(other.indices)
    assert not first.dropped.equal(other.dropped)
