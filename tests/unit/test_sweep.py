import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from deme_core.downloads import download_once
from deme_core.file_store import FileStore
from deme_core.scratch_folder import scratch_folder
from flows.sweep import sweep, sweep_cache, sweep_checkpoints
from tests.small_run import make_context
from tests.store_contract import keys


def test_what_killed_processes_left_is_freed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_HOME", str(tmp_path))
    monkeypatch.delenv("DEME_STORE_URI", raising=False)
    artifacts = make_context(tmp_path).artifacts
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_text("a")
    ref, _ = artifacts.publish("merged", "whole", tmp_path / "made", settings={}, inputs={})
    half = f"merged/killed/upload-{'0' * 32}/a"
    artifacts.store.put_bytes(half, b"half")
    of_killed_run = ("jobs/5e2a.json", "jobs/sender-5e2b")
    for key in of_killed_run:
        artifacts.store.put_bytes(key, b"{}")
    for name in ("old", "busy"):
        (tmp_path / "scratch" / name / "out").mkdir(parents=True)
        (tmp_path / "scratch" / name / "out" / "weights").write_text("")
    assert sweep(timedelta(hours=1)) == (0, 0)

    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (0, 0))
    for path in (tmp_path / "scratch").rglob("*"):
        os.utime(path, (0, 0))
    os.utime(tmp_path / "scratch" / "busy" / "out" / "weights")
    assert sweep(timedelta(hours=1)) == (3, 1)
    assert not any(artifacts.store.exists(key) for key in (half, *of_killed_run))
    assert len(keys(artifacts.store)) == 2 and artifacts.fetch(ref).is_dir()
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["busy"]


def test_checkpoints_of_trainings_that_nobody_goes_on_with_are_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEME_HOME", str(tmp_path))
    monkeypatch.delenv("DEME_STORE_URI", raising=False)
    artifacts = make_context(tmp_path).artifacts
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_text("a")

    def publish(stage: str, digest: str) -> None:
        artifacts.publish(stage, digest, tmp_path / "made", settings={}, inputs={})

    killed, resumed = (f"checkpoints/{digit * 64}" for digit in "ab")
    for stage in (killed, resumed):
        publish(stage, "0000000001")
    publish("merged", "whole")
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (0, 0))
    publish(resumed, "0000000002")
    assert sweep_checkpoints(timedelta(days=1)) == 1
    assert not artifacts.list_refs(killed)
    assert len(artifacts.list_refs(resumed)) == 2
    assert artifacts.find("merged", "whole")
    assert not [key for key in keys(artifacts.store) if killed in key]


def use_for_ever(parent: Path, ready: Connection) -> None:
    with scratch_folder(parent):
        ready.send(True)
        time.sleep(60)


def test_a_folder_that_is_in_use_is_spared_however_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a training, which writes its model at its end and has the frozen parts of a new one there."""
    monkeypatch.setenv("DEME_HOME", str(tmp_path))
    monkeypatch.delenv("DEME_STORE_URI", raising=False)
    context = multiprocessing.get_context("spawn")  # Without threads of other tests, which could hold locks for ever.
    told, ready = context.Pipe(duplex=False)
    killed = context.Process(target=use_for_ever, args=(tmp_path / "scratch", ready))
    killed.start()
    assert told.recv()
    with make_context(tmp_path).scratch_folder() as out:
        (out / "frozen").write_text("part")
        for path in (tmp_path / "scratch").rglob("*"):
            os.utime(path, (0, 0))
        assert sweep(timedelta(hours=1)) == (0, 0)
        killed.kill()
        killed.join()
        assert sweep(timedelta(hours=1)) == (0, 1)
        assert (out / "frozen").read_text() == "part"
    assert not list((tmp_path / "scratch").iterdir())


def test_a_folder_that_vanishes_stops_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_HOME", str(tmp_path))
    monkeypatch.delenv("DEME_STORE_URI", raising=False)
    for name in ("kept", "vanishing"):
        (tmp_path / "scratch" / name / "out").mkdir(parents=True)
    for path in (tmp_path / "scratch").rglob("*"):
        os.utime(path, (0, 0))
    rglob = Path.rglob

    def vanish_after_listing(folder: Path, pattern: str) -> Iterator[Path]:
        listed = list(rglob(folder, pattern))
        if folder.name == "vanishing":
            shutil.rmtree(folder)
        return iter(listed)

    monkeypatch.setattr(Path, "rglob", vanish_after_listing)
    assert sweep(timedelta(hours=1)) == (0, 1)
    assert not list((tmp_path / "scratch").iterdir())


def test_a_clock_that_is_wrong_does_not_sweep_what_is_being_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEME_HOME", str(tmp_path))
    monkeypatch.delenv("DEME_STORE_URI", raising=False)
    store = make_context(tmp_path).artifacts.store
    half = f"merged/growing/upload-{'0' * 32}/a"
    store.put_bytes(half, b"half")
    (tmp_path / "scratch" / "busy").mkdir(parents=True)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10**8)
    assert sweep(timedelta(hours=1)) == (0, 0)
    assert store.exists(half)


def test_copies_that_nobody_asked_for_are_freed_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_HOME", str(tmp_path))
    monkeypatch.delenv("DEME_STORE_URI", raising=False)
    artifacts, cache = make_context(tmp_path).artifacts, tmp_path / "cache"
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_text("1234")
    used, unused, remade = (
        artifacts.publish("merged", name, tmp_path / "made", settings={}, inputs={})[0]
        for name in ("used", "unused", "remade")
    )
    source = FileStore(tmp_path / "elsewhere")
    source.put_bytes("image.png", b"56")
    for folder in ("images/downloads/used", "images/downloads/unused", "sources/unused"):
        download_once(source, list(source.list("")), cache / folder)
    spared = ["extractors/weights", "images/inspected/record", "images/shards/tar"]
    for name in spared:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("")
    for ref in (used, unused):
        artifacts.fetch(ref)
    for path in cache.rglob("*"):
        os.utime(path, (0, 0))
    artifacts.fetch(used), artifacts.fetch(remade)
    download_once(source, list(source.list("")), cache / "images" / "downloads" / "used")

    assert sweep_cache(timedelta(days=1)) == 4 + 2 * 2
    assert {path.name.partition("-")[0] for path in (cache / "merged").iterdir()} == {"used", "remade"}
    assert [path.name for path in (cache / "images" / "downloads").iterdir()] == ["used"]
    assert not any((cache / "sources").iterdir())
    assert all((cache / name).exists() for name in spared)
    assert (artifacts.fetch(unused) / "a").read_text() == "1234"
    assert sweep_cache(timedelta(days=1)) == 0
