import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from deme_core.downloads import download_once
from deme_core.errors import ExtractorUnavailableError, ObjectTooLargeError, StoreUnavailableError
from deme_core.extractors import base
from deme_core.extractors.base import local_file
from deme_core.file_store import FileStore
from deme_core.prompts import load_prompts


def test_what_is_not_as_large_as_it_was_listed_is_not_kept(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    store.put_bytes("a/weights", bytes(100))
    listed = list(store.list(""))
    for size, error in ((99, StoreUnavailableError), (101, ObjectTooLargeError)):
        store.put_bytes("a/weights", bytes(size))
        with pytest.raises(error, match=r"store/a/weights (is smaller|holds more) than"):
            download_once(store, listed, tmp_path / "cache")
        assert not (tmp_path / "cache" / "a" / "weights").exists()
    found = download_once(store, list(store.list("")), tmp_path / "cache")
    assert (found / "a" / "weights").stat().st_size == 101


def test_what_the_disk_cannot_hold_is_not_begun(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    store.put_bytes("a", b"1")
    store.put_bytes("b", b"2")
    small, large = sorted(store.list(""), key=lambda item: item.key)
    with pytest.raises(StoreUnavailableError, match=r"1000000000\.0 GB are needed"):
        download_once(store, [small, replace(large, size=10**18)], tmp_path / "cache")
    assert not (tmp_path / "cache" / "a").exists()


def test_extractor_weights_are_fetched_if_the_disk_can_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my weights").write_bytes(b"12345")
    uri = (tmp_path / "my weights").as_uri()
    assert local_file(uri, tmp_path / "cache", "mend").read_bytes() == b"12345"
    os.truncate(tmp_path / "my weights", 10**12)  # A hole, which takes no space.
    assert local_file(uri, tmp_path / "cache", "mend").read_bytes() == b"12345"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**11))
    with pytest.raises(StoreUnavailableError, match=r"1000\.0 GB are needed"):
        local_file(uri, tmp_path / "other", "mend")
    with pytest.raises(ExtractorUnavailableError, match=r"absent cannot be had \(there is no such object\); mend"):
        local_file((tmp_path / "absent").as_uri(), tmp_path / "other", "mend")


def test_extractor_weights_replaced_behind_their_uri_are_fetched_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, cache = tmp_path / "weights", tmp_path / "cache"
    weights.write_bytes(b"old")
    first = local_file(weights.as_uri(), cache, "mend")
    rewrite(weights, b"new")
    assert local_file(weights.as_uri(), cache, "mend") == first, "what was digested is what is loaded"
    monkeypatch.setattr(base, "_FETCHED", {})  # What a new process has.
    assert local_file(weights.as_uri(), cache, "mend").read_bytes() == b"new"
    assert first.read_bytes() == b"old"
    listed = []
    monkeypatch.setattr(FileStore, "list", lambda self, prefix: listed.append(prefix) or iter(()))
    assert local_file(weights.as_uri(), cache, "mend").read_bytes() == b"new"
    assert not listed


def test_weights_that_are_removed_from_the_cache_are_fetched_anew(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"damaged")
    local_file(weights.as_uri(), tmp_path / "cache", "mend").unlink()
    weights.write_bytes(b"whole")
    assert local_file(weights.as_uri(), tmp_path / "cache", "mend").read_bytes() == b"whole"


def test_what_is_rewritten_in_its_size_and_time_is_another_version(tmp_path: Path) -> None:
    """Models, images, tars, prompts and CLIP's weights are all fetched into the folder of their listing's version."""
    (path := tmp_path / "p.txt").write_text("a cat")
    assert load_prompts(path.as_uri(), tmp_path / "cache").texts == ("a cat",)
    rewrite(path, b"a dog")
    assert load_prompts(path.as_uri(), tmp_path / "cache").texts == ("a dog",)


def rewrite(path: Path, content: bytes) -> None:
    """Other bytes in place, with the time of the ones before, as tools that copy times do it."""
    time_ns = path.stat().st_mtime_ns
    time.sleep(0.02)  # The clock of file systems ticks every few milliseconds.
    path.write_bytes(content)
    os.utime(path, ns=(time_ns, time_ns))
