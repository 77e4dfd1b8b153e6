"""Of a data set with several splits only the wanted one is brought and prepared."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from deme_core.errors import DatasetError
from deme_core.images import ImageDataset, load_images
from deme_core.images.preview import preview_images
from deme_core.recipe import DatasetSpec
from tests.http_server import serving, url_of

NUM_IMAGES = {"train": 6, "validation": 4, "test": 3}
COMMIT = "c" * 40


def rows(split: str) -> datasets.Dataset:
    """Images of a split, each with one of two classes."""
    generator = np.random.default_rng(len(split))
    images = []
    for _ in range(NUM_IMAGES[split]):
        Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(file := BytesIO(), "png")
        images.append({"bytes": file.getvalue(), "path": None})
    table = datasets.Dataset.from_dict({"image": images, "label": [n % 2 for n in range(len(images))]})
    table = table.cast_column("image", datasets.Image())
    # As where the first split alone says what its numbers mean.
    return table.cast_column("label", datasets.ClassLabel(names=["cat", "dog"])) if split == "train" else table


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three splits as parquet, and an empty cache."""
    datasets.disable_progress_bars()
    use_cache(tmp_path / "hf", monkeypatch)
    for split in NUM_IMAGES:
        (tmp_path / "published" / "data").mkdir(parents=True, exist_ok=True)
        rows(split).to_parquet(tmp_path / "published" / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "published"


def describe(folder: Path, **counts: int) -> None:
    """Writes what the hub says of a data set."""
    splits = [{"name": name, "num_bytes": 1, "num_examples": count} for name, count in (NUM_IMAGES | counts).items()]
    features = [
        {"name": "image", "dtype": "image"},
        {"name": "label", "dtype": {"class_label": {"names": {"0": "tabby", "1": "poodle"}}}},
    ]
    info = {"features": features, "splits": splits, "download_size": 10**18, "dataset_size": 10**18}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'dataset_info': info})}---\n")


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def spec_of(path: Path | str, split: str) -> DatasetSpec:
    given = {"source": "hub", "path": str(path), "split": split, "resolution": 8}
    return DatasetSpec.model_validate(given | {"caption_template": "a {label}", "label_column": "label"})


def load(path: Path | str, split: str, tmp_path: Path) -> ImageDataset:
    return load_images(spec_of(path, split), cache=tmp_path / "cache")


def prepared(cache: Path) -> set[str]:
    """The splits that lie in a cache."""
    return {path.stem.rpartition("-")[2] for path in cache.rglob("*.arrow")}


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("split", ["validation", "validation[1:3]", "test[:50%]", "train"])
def test_one_split_is_prepared_and_is_what_it_was_with_all(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, described: bool
) -> None:
    if described:
        describe(published)
    alone = load(published, split, tmp_path)
    assert prepared(tmp_path / "hf") == {split.partition("[")[0]}
    again = load(published, split, tmp_path)
    use_cache(tmp_path / "hf of all", monkeypatch)
    datasets.load_dataset(str(published))
    whole = load(published, split, tmp_path)
    assert not prepared(tmp_path / "hf of all" / "one-split")
    assert alone.fingerprint == again.fingerprint == whole.fingerprint
    names = ["tabby", "poodle"] if described else ["cat", "dog"]
    assert alone.captions == whole.captions == [f"a {names[label]}" for label in alone.labels or ()]


@pytest.mark.parametrize("split", ["train+test", "train[:2]+test[1:]", "all"])
def test_several_splits_are_prepared_with_all(published: Path, tmp_path: Path, split: str) -> None:
    dataset = load(published, split, tmp_path)
    assert len(dataset) == len(datasets.load_dataset(str(published), split=split))
    assert prepared(tmp_path / "hf") == set(NUM_IMAGES)


def test_a_folder_of_images_has_its_classes_from_all_splits(published: Path, tmp_path: Path) -> None:
    for name in ("train/bee", "train/cat", "test/ant", "test/bee", "test/cat"):
        (tmp_path / "files" / name).mkdir(parents=True)
        (tmp_path / "files" / name / "0.png").write_bytes(
            rows("train").with_format("arrow")[0]["image"][0]["bytes"].as_py()
        )
    dataset = load(tmp_path / "files", "train", tmp_path)
    assert (dataset.captions, dataset.labels) == (["a bee", "a cat"], [1, 2])


@pytest.mark.parametrize("split", ["dev", "dev[:2]", "train[", "../train"])
def test_a_split_that_there_is_not_is_named(published: Path, tmp_path: Path, split: str) -> None:
    with pytest.raises(DatasetError, match="Cannot load split"):
        load(published, split, tmp_path)
    assert not (tmp_path / "hf" / "train").exists()


def test_a_split_with_fewer_rows_than_described_is_refused(published: Path, tmp_path: Path) -> None:
    describe(published, validation=5)
    with pytest.raises(DatasetError, match="Cannot load split 'validation'"):
        load(published, "validation", tmp_path)
    assert len(load(published, "test", tmp_path)) == NUM_IMAGES["test"]


class Hub(BaseHTTPRequestHandler):
    """A hub with one data set, which keeps the names of the files that were asked for whole."""

    folder: ClassVar[Path]
    got: ClassVar[list[str]] = []
    num_refusals: ClassVar[int] = 0

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self._send(json.dumps([self._entry(path) for path in form["paths"] if (self.folder / path).exists()]).encode())

    def _answer(self, *, with_body: bool) -> None:
        if Hub.num_refusals:
            Hub.num_refusals -= 1
            self._send(b"", status=401)
            return
        path = unquote(urlsplit(self.path).path)
        name = path.partition(f"/{COMMIT}")[2].strip("/") or path.partition("/main/")[2]
        if "/tree/" in path:
            entries = sorted(file.relative_to(self.folder).as_posix() for file in (self.folder / name).iterdir())
            self._send(json.dumps([self._entry(entry) for entry in entries]).encode())
        elif path.startswith("/api/datasets/"):
            self._send(json.dumps({"id": "some/pets", "sha": COMMIT, "siblings": []}).encode())
        elif (file := self.folder / name).is_file():
            self._send_file(file, with_body=with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send_file(self, file: Path, *, with_body: bool) -> None:
        if asked := self.headers["Range"]:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            self._send(file.read_bytes()[first : last + 1], status=206)
        else:
            self.got += [file.name] if with_body else []
            self._send(file.read_bytes(), with_body=with_body)

    def _entry(self, path: str) -> dict[str, object]:
        file = self.folder / path
        kind, size = ("directory", 0) if file.is_dir() else ("file", file.stat().st_size)
        return {"type": kind, "path": path, "oid": path.replace("/", "-"), "size": size}

    def _send(self, body: bytes, *, status: int = 200, with_body: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{self.path.replace("/", "-")}"')
        self.end_headers()
        self.wfile.write(body if with_body else b"")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.folder, Hub.got, Hub.num_refusals = published, [], 0
    with serving(Hub) as server:
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", url_of(server))
        files = f"{url_of(server)}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}"
        monkeypatch.setattr("datasets.config.HUB_DATASETS_URL", files)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield Hub


def downloads(hub: type[Hub]) -> list[str]:
    """The splits of the tables that were asked for whole."""
    return [name.partition("-")[0] for name in hub.got if name.endswith(".parquet")]


def test_one_split_is_downloaded_from_the_hub_and_needs_none_afterwards(
    hub: type[Hub], published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(published)
    online = load("some/pets", "validation", tmp_path)
    assert downloads(hub) == ["validation"]
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert preview_images(spec_of("some/pets", "validation[:2]"), tmp_path / "cache").num_images == 2
    assert load("some/pets", "validation", tmp_path).fingerprint == online.fingerprint
    with pytest.raises(DatasetError, match="Cannot load split 'test'"):
        load("some/pets", "test", tmp_path)


def test_columns_of_a_hub_that_does_not_describe_them_are_read_without_the_other_splits(
    hub: type[Hub], published: Path, tmp_path: Path
) -> None:
    assert load("some/pets", "validation", tmp_path).captions == ["a cat", "a dog"] * 2
    assert downloads(hub) == ["validation"]


@pytest.mark.parametrize("place", ["{tmp}/private.parquet", "hf://datasets/other/pets/data/*.parquet"])
def test_a_hub_data_set_that_names_files_of_others_is_refused(
    hub: type[Hub], published: Path, tmp_path: Path, place: str
) -> None:
    rows("train").to_parquet(tmp_path / "private.parquet")
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": place.format(tmp=tmp_path)}]}]
    (published / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    with pytest.raises(DatasetError, match=r"some/pets (names data files that|\(Data files don't belong)"):
        load("some/pets", "train", tmp_path)
    assert not downloads(hub)


def test_a_hub_that_refuses_once_does_not_make_all_splits_come(hub: type[Hub], published: Path, tmp_path: Path) -> None:
    hub.num_refusals = 1
    with pytest.raises(DatasetError, match="Cannot load split 'validation'"):
        load("some/pets", "validation", tmp_path)
    assert hub.num_refusals == 0 and not downloads(hub)
    assert len(load("some/pets", "validation", tmp_path)) == NUM_IMAGES["validation"]


def test_what_was_prepared_with_all_splits_needs_no_hub(
    hub: type[Hub], published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(published)
    datasets.load_dataset("some/pets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(load("some/pets", "validation", tmp_path)) == NUM_IMAGES["validation"]
    assert len(load("some/pets", "train+test", tmp_path)) == NUM_IMAGES["train"] + NUM_IMAGES["test"]
