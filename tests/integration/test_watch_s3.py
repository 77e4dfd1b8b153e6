"""The watch on a real S3 server: races, refusals, the store's own clock."""

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from deme_core.checkpoint_watch.ledger import Ledger
from deme_core.checkpoint_watch.look import look, open_prefix
from deme_core.errors import StoreUnavailableError
from deme_core.store import ObjectStore, open_store
from tests.integration.conftest import S3Server
from tests.tiny_models import one_level_unet, randomize, write_tiny_folder

CONFIG = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
NUM_WATCHERS = 2
# Looks, waits until all have looked, then claims; prints whether it started the run.
WATCHER = """
import sys, time, pathlib
from datetime import timedelta
from deme_core.checkpoint_watch.ledger import Ledger
from deme_core.checkpoint_watch.look import look, open_prefix
from deme_core.store import open_store
prefix, own, scratch, number = sys.argv[1:]
source, home = open_prefix(prefix), pathlib.Path(scratch, number)
ledger = Ledger(open_store(own), prefix=source.uri, recipe="digits")
[finding] = look(source, ledger, settle=timedelta(0), home=home)
(home / "ready").touch()
while len(list(pathlib.Path(scratch).glob("*/ready"))) < int(NUM):
    time.sleep(0.005)
print(ledger.start_once(finding.look, lambda: f"run {number}", claimed_by=number)[1])
""".replace("NUM", str(NUM_WATCHERS))


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.make_bucket("watch")


@pytest.fixture(autouse=True)
def environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def root(bucket: str) -> str:
    return f"s3://{bucket}/{uuid4().hex}"


def upload(folder: Path, uri: str) -> None:
    store = open_store(uri)
    for file in folder.rglob("*"):
        if file.is_file():
            store.put_file(file.relative_to(folder).as_posix(), file)


def model(path: Path, seed: int = 0) -> Path:
    return write_tiny_folder(path, randomize(one_level_unet(), seed=seed), **CONFIG)


def open_both(root: str) -> tuple[ObjectStore, Ledger]:
    source = open_prefix(f"{root}/inbox")
    return source, Ledger(open_store(f"{root}/own"), prefix=source.uri, recipe="digits")


def test_of_processes_at_once_one_starts_the_run(root: str, tmp_path: Path) -> None:
    upload(model(tmp_path / "model"), f"{root}/inbox/a")
    (tmp_path / "scratch").mkdir()
    command = [sys.executable, "-c", WATCHER, f"{root}/inbox", f"{root}/own", str(tmp_path / "scratch")]
    watchers = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(NUM_WATCHERS)]
    told = sorted(watcher.communicate(timeout=120)[0].strip() for watcher in watchers)
    assert told == ["False"] * (NUM_WATCHERS - 1) + ["True"]
    own = open_store(f"{root}/own")
    [start] = [found.key for found in own.list("watch/") if "/starts/" in found.key]
    assert json.loads(own.get_bytes(start))["flow_run_id"].startswith("run ")


def test_an_upload_waits_by_the_servers_clock(root: str, tmp_path: Path) -> None:
    upload(model(tmp_path / "model"), f"{root}/inbox/a")
    outcomes = []
    for settle in (timedelta(hours=1), timedelta(0)):
        source, ledger = open_both(root)
        [finding] = look(source, ledger, settle=settle, home=tmp_path)
        outcomes.append(finding.look.verdict.outcome)
    assert outcomes == ["waiting", "whole"]
    assert finding.look.uri == f"{root}/inbox/a"


def test_the_prefix_itself_may_be_a_model(root: str, tmp_path: Path) -> None:
    upload(model(tmp_path / "model"), f"{root}/inbox")
    upload(model(tmp_path / "model"), f"{root}/inbox-of-another")
    source, ledger = open_both(root)
    [finding] = look(source, ledger, settle=timedelta(0), home=tmp_path)
    assert finding.look.uri == f"{root}/inbox"


def deny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-hush")
    return "watch/inbox"


def leave_out_bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    return "nowhere/inbox"


@pytest.mark.parametrize(
    ("prepare", "words"), [(deny, "denies access"), (leave_out_bucket, "create it or correct the prefix")]
)
def test_a_prefix_that_cannot_be_used_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bucket: str,
    prepare: Callable[[pytest.MonkeyPatch], str],
    words: str,
) -> None:
    source = open_prefix(f"s3://{prepare(monkeypatch)}")
    ledger = Ledger(open_store((tmp_path / "own").as_uri()), prefix=source.uri, recipe="digits")
    with pytest.raises(StoreUnavailableError, match=words) as caught:
        look(source, ledger, settle=timedelta(0), home=tmp_path)
    message = str(caught.value)
    assert source.uri in message and "hush" not in message and "\n" not in message and message.endswith(".")
    assert not (tmp_path / "own").exists()
