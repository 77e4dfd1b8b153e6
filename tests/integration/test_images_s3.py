import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

from deme_core.errors import DatasetError, StoreUnavailableError
from deme_core.images import ImageDataset, load_images
from deme_core.recipe import DatasetSpec
from deme_core.store import open_store
from tests.integration.conftest import S3Server

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


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str | Path], ImageDataset]:
    def load(path: str | Path) -> ImageDataset:
        spec = DatasetSpec(source="imagefolder", path=str(path), resolution=8)
        return load_images(spec, cache=tmp_path / "cache")

    return load


@pytest.mark.parametrize("name", ["faces", "faces/", "faces.zip"])
def test_a_bucket_holds_the_same_images_as_the_folder(
    folder: Path, uri: str, load: Callable[[str | Path], ImageDataset], name: str
) -> None:
    assert load(f"{uri}/{name}").fingerprint == load(folder).fingerprint


def test_images_are_downloaded_once_and_again_when_they_change(
    uri: str, tmp_path: Path, load: Callable[[str | Path], ImageDataset]
) -> None:
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


def test_what_is_missing_is_named(uri: str, load: Callable[[str | Path], ImageDataset]) -> None:
    with pytest.raises(DatasetError, match=r"no image at .*/nothing; check dataset\.path"):
        load(f"{uri}/nothing")
    with pytest.raises(DatasetError, match=r"no such zip at .*/nothing\.zip; check dataset\.path"):
        load(f"{uri}/nothing.zip")
    with pytest.raises(DatasetError, match="no object-store URI"):
        load("s3:///prefix")
    with pytest.raises(StoreUnavailableError, match="s3://no-such-bucket/prefix"):
        load("s3://no-such-bucket/prefix")
