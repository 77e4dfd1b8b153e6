import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import pytest

from deme_core.errors import InputError, ModelFolderError, StoreUnavailableError
from deme_core.model_source import fetch_source
from tests.http_server import serving, url_of
from tests.tiny_models import one_level_unet, write_tiny_folder

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """A hub with one model, which may claim other sizes than its files have."""

    folder: ClassVar[Path]
    claimed: ClassVar[dict[str, int]] = {}
    got: ClassVar[list[str]] = []
    asked: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        files = {f.relative_to(self.folder).as_posix(): f for f in self.folder.rglob("*") if f.is_file()}
        if path.startswith("/api/"):
            self.asked.add(path.rpartition("/")[2])
            sizes = {name: self.claimed.get(name, file.stat().st_size) for name, file in files.items()}
            tree = [{"type": "file", "path": name, "oid": name, "size": size} for name, size in sizes.items()]
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            model = {"id": "a/model", "sha": COMMIT, "siblings": siblings}
            body = json.dumps(tree if "/tree/" in path else model).encode()
        else:
            name = path.partition(f"/{COMMIT}/")[2]
            body = files[name].read_bytes()
            self.got += [name] if with_body else []
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{path.replace("/", "-")}"')
        self.end_headers()
        self.wfile.write(body if with_body else b"")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.folder, Hub.claimed, Hub.got = write_tiny_folder(tmp_path / "published", one_level_unet()), {}, []
    for name in (".gitattributes", "README.md", "unet/diffusion_pytorch_model.bin"):  # Of which none is needed.
        (Hub.folder / name).write_text("else")
    with serving(Hub) as server:
        address = url_of(server)
        for name in ("constants.ENDPOINT", "hf_api.api.endpoint"):
            monkeypatch.setattr(f"huggingface_hub.{name}", address)
        files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield Hub


def test_a_model_of_the_hub_is_fetched_once(hub: type[Hub], tmp_path: Path) -> None:
    fetched = fetch_source("a/model", revision=None, cache=tmp_path / "cache")
    files = {
        f.relative_to(hub.folder).as_posix() for f in hub.folder.rglob("*") if f.suffix in (".json", ".safetensors")
    }
    assert {name: (fetched / name).read_bytes() for name in files} == {n: (hub.folder / n).read_bytes() for n in files}
    assert sorted(hub.got) == sorted(files)
    assert fetch_source("a/model", revision=None, cache=tmp_path / "cache") == fetched
    assert len(hub.got) == len(files)


def test_the_revision_that_is_asked_for_is_the_one_that_comes(hub: type[Hub], tmp_path: Path) -> None:
    hub.asked.clear()
    fetch_source("a/model", revision="v2", cache=tmp_path / "cache")
    assert hub.asked == {"v2", COMMIT}


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_model_of_the_hub_that_was_downloaded_needs_the_hub_no_more(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    fetched = fetch_source("a/model", revision=revision, cache=tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_source("a/model", revision=revision, cache=tmp_path / "cache") == fetched
    (fetched / "unet" / "config.json").unlink()
    with pytest.raises(ModelFolderError, match="could not be had from the hub"):
        fetch_source("a/model", revision=revision, cache=tmp_path / "cache")
    with pytest.raises(ModelFolderError, match="could not be had from the hub"):
        fetch_source("another/model", revision=revision, cache=tmp_path / "cache")


def test_a_model_of_the_hub_that_the_disk_cannot_hold_is_not_begun(hub: type[Hub], tmp_path: Path) -> None:
    hub.claimed = {"unet/diffusion_pytorch_model.safetensors": 10**18}
    with pytest.raises(StoreUnavailableError, match=r"hf \(1000000000\.0 GB are needed.*HF_HOME"):
        fetch_source("a/model", revision=None, cache=tmp_path / "cache")
    assert hub.got == []


def test_an_error_without_a_text_is_told_by_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_slow(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.model_info", be_slow)
    with pytest.raises(ModelFolderError, match=r"could not be had from the hub \(TimeoutError: TimeoutError\)"):
        fetch_source("a/model", revision=None, cache=tmp_path / "cache")


def test_a_wrong_address_is_told_without_being_repeated(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError) as caught:
        fetch_source("https://user:hush@example.org/a/model", revision=None, cache=tmp_path / "cache")
    assert str(caught.value) == "The model's address is no object-store URI; give s3://BUCKET/PREFIX."


def test_what_is_no_model_is_told_in_words_for_an_argument_and_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFolderError) as caught:
        fetch_source("nope", revision=None, cache=tmp_path / "cache")
    assert str(caught.value) == (
        "The model 'nope' is no folder, object-store URI or hub id; name a folder that holds the model, "
        "s3://BUCKET/PREFIX or OWNER/MODEL."
    )


def test_a_name_that_no_folder_can_have_is_one_sentence(tmp_path: Path) -> None:
    for name in ("a" * 300, "~nosuchuser/model"):
        with pytest.raises(InputError, match="Cannot look for"):
            fetch_source(name, revision=None, cache=tmp_path)
