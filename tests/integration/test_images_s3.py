import io
import itertools
import json
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from PIL import Image

from deme_core.errors import DatasetError, StoreUnavailableError
from deme_core.images import ImageDataset, TrainingBatches, load_images
from deme_core.recipe import DatasetSpec
from deme_core.store import open_store
from tests.integration.conftest import S3Server
from tests.own_process import succeeds
from tests.unit.test_stream import TAR_BYTES, pack_tars

NUM_IMAGES = 12


@pytest.fixture(autouse=True)
def environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number} ü.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def uri(s3_server: S3Server, folder: Path) -> str:
    """A prefix that holds the folder, its zip beside it, and a neighbour whose name starts alike."""
    uri = f"s3://{s3_server.make_bucket(f'images-{uuid4().hex}')}/sets"
    store = open_store(uri)
    for path in folder.rglob("*.png"):
        store.put_file(f"faces/{path.relative_to(folder).as_posix()}", path)
    store.put_bytes("faces/notes.txt", b"no image")
    store.put_bytes("faces2/0.png", b"another set")
    with zipfile.ZipFile(folder.parent / "faces.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(folder))
    store.put_file("faces.zip", folder.parent / "faces.zip")
    return uri


Load = Callable[..., ImageDataset]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(path: str | Path, source: str = "imagefolder", **settings: object) -> ImageDataset:
        spec = {"source": source, "path": str(path), "resolution": 8, **settings}
        return load_images(DatasetSpec.model_validate(spec), cache=tmp_path / "cache")

    return load


@pytest.mark.parametrize("name", ["faces", "faces/", "faces.zip"])
def test_a_bucket_holds_the_same_images_as_the_folder(folder: Path, uri: str, load: Load, name: str) -> None:
    assert load(f"{uri}/{name}").fingerprint == load(folder).fingerprint


def test_images_are_downloaded_once_and_again_when_they_change(uri: str, tmp_path: Path, load: Load) -> None:
    def downloads() -> dict[Path, int]:
        return {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*.png")}

    with ThreadPoolExecutor(3) as executor:
        fingerprints = {dataset.fingerprint for dataset in executor.map(load, [f"{uri}/faces"] * 3)}
    assert len(fingerprints) == 1
    once = downloads()
    assert len(once) == NUM_IMAGES
    load(f"{uri}/faces")
    assert downloads() == once
    open_store(uri).delete("faces/a/0 ü.png")
    changed = load(f"{uri}/faces")
    assert len(changed) == NUM_IMAGES - 1
    assert changed.fingerprint not in fingerprints


def test_no_more_images_are_downloaded_than_are_used(folder: Path, uri: str, tmp_path: Path, load: Load) -> None:
    assert load(f"{uri}/faces", num_images=7).fingerprint == load(folder, num_images=7).fingerprint
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 7


def test_a_bucket_holds_the_same_captions_as_the_folder(folder: Path, uri: str, load: Load) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    rows = [json.dumps({"file_name": name, "text": f"picture {name}"}, ensure_ascii=False) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(rows), "utf-8")
    with pytest.raises(DatasetError, match=r"Column 'text' is not in .*, which has label; set dataset\.caption_column"):
        load(f"{uri}/faces", caption_column="text")
    open_store(uri).put_file("faces/metadata.jsonl", folder / "metadata.jsonl")
    stored = load(f"{uri}/faces", caption_column="text", label_column="label")
    assert stored.captions == [f"picture {name}" for name in names]
    assert stored.labels == ["ab".index(name[0]) for name in names]
    assert stored.fingerprint == load(folder, caption_column="text", label_column="label").fingerprint


@pytest.mark.parametrize("name", ["tars", "tars/0.tar"])
def test_a_bucket_holds_the_same_tars_as_the_folder(
    folder: Path, uri: str, tmp_path: Path, load: Load, name: str
) -> None:
    (tmp_path / "tars").mkdir()
    for number, tar in enumerate(("0.tar", "1.tar")):
        with tarfile.open(tmp_path / "tars" / tar, "w") as archive:
            for path in sorted(folder.rglob("*.png"))[number::2]:
                archive.add(path, path.relative_to(folder).as_posix())
                text = tarfile.TarInfo(path.relative_to(folder).with_suffix(".txt").as_posix())
                text.size = len(path.stem.encode())
                archive.addfile(text, io.BytesIO(path.stem.encode()))
        open_store(uri).put_file(f"tars/{tar}", tmp_path / "tars" / tar)
    open_store(uri).put_bytes("tars/README.md", b"notes")
    stored, local = (load(f"{root}/{name}", "webdataset", caption_column="txt") for root in (uri, tmp_path))
    assert len(stored) == (NUM_IMAGES if name == "tars" else NUM_IMAGES // 2)
    assert stored.fingerprint == local.fingerprint
    assert not list((tmp_path / "cache").rglob("README.md"))


def test_what_is_missing_is_named(uri: str, load: Load) -> None:
    with pytest.raises(DatasetError, match=r"no image at .*/nothing; check dataset\.path"):
        load(f"{uri}/nothing")
    with pytest.raises(DatasetError, match=r"no such zip at .*/nothing\.zip; check dataset\.path"):
        load(f"{uri}/nothing.zip")
    with pytest.raises(DatasetError, match=r"no tar at .*/faces; check dataset\.path"):
        load(f"{uri}/faces", "webdataset")
    with pytest.raises(DatasetError, match=r"no such tar at .*/nothing\.tar; check dataset\.path"):
        load(f"{uri}/nothing.tar", "webdataset")
    with pytest.raises(DatasetError, match="no object-store URI"):
        load("s3:///prefix")
    with pytest.raises(StoreUnavailableError, match="s3://no-such-bucket/prefix"):
        load("s3://no-such-bucket/prefix")


def _train_twice(spec: DatasetSpec, cache: Path, index: str) -> None:
    """Decodes in a forked process and in this one, which gives the same batches."""
    images = load_images(spec, cache=cache, index_store=open_store(index))
    decoded, expected = (
        TrainingBatches(images, batch_size=4, seed=0, random_crop=False, random_flip=True, num_workers=num_workers)
        for num_workers in (1, 0)
    )
    for batch, expected_batch in itertools.islice(zip(decoded, expected, strict=True), 6):
        assert torch.equal(batch.clean_images, expected_batch.clean_images)


def test_large_tars_are_brought_by_processes_that_decode(s3_server: S3Server, tmp_path: Path) -> None:
    prefix = f"s3://{s3_server.make_bucket(f'stream-{uuid4().hex}')}/tars"
    pack_tars(folder := tmp_path / "tars")
    for number in range(2):  # Too large for one request.
        with tarfile.open(folder / f"{number:03d}.tar", "a") as archive:
            padding = tarfile.TarInfo("padding.bin")
            padding.size = 17 * 2**20
            archive.addfile(padding, io.BytesIO(bytes(padding.size)))
        open_store(prefix).put_file(f"{number}.tar", folder / f"{number:03d}.tar")
    spec = DatasetSpec.model_validate(
        {"source": "webdataset", "path": prefix, "resolution": 8, "stream": True, "stream_window": 1, "cache_gb": 0.02}
    )
    assert succeeds(partial(_train_twice, spec, tmp_path / "cache", f"{prefix}-index"), seconds=120)


def test_tars_larger_than_the_cache_are_streamed(s3_server: S3Server, tmp_path: Path) -> None:
    prefix = f"s3://{s3_server.make_bucket(f'stream-{uuid4().hex}')}/tars"
    pack_tars(folder := tmp_path / "tars")
    for path in folder.iterdir():
        open_store(prefix).put_file(path.name, path)
    spec = DatasetSpec.model_validate(
        {"source": "webdataset", "path": prefix, "resolution": 8, "stream": True, "stream_window": 2}
        | {"cache_gb": 3 * TAR_BYTES / 1e9, "caption_column": "txt"}
    )
    local = spec.model_copy(update={"path": str(folder), "stream": False})
    index_store = open_store(f"{prefix}-index")
    streamed = load_images(spec, cache=tmp_path / "cache", index_store=index_store)
    assert streamed.example_fingerprint == load_images(local, cache=tmp_path).example_fingerprint
    again = load_images(spec, cache=tmp_path / "cache of another machine", index_store=index_store)
    batches, resumed = (
        TrainingBatches(images, batch_size=4, seed=0, random_crop=False, random_flip=True, start_batch=start)
        for images, start in ((streamed, 0), (again, 20))
    )
    for batch, expected in zip(itertools.islice(resumed, 4), itertools.islice(batches, 20, 24), strict=True):
        assert torch.equal(batch.clean_images, expected.clean_images) and batch.captions == expected.captions
