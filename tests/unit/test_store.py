import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError

from deme_core import file_store
from deme_core.errors import ArtifactNotFoundError, InputError, ObjectTooLargeError, StoreUnavailableError
from deme_core.file_store import FileStore
from deme_core.s3_store import S3Store
from deme_core.store import check_access, open_store
from tests.store_contract import StoreContract, keys, race


class TestFileStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> FileStore:
        return FileStore(tmp_path / "store")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    store = FileStore(small_disk)
    store.put_bytes("model/weights", b"old")
    (tmp_path / "large").write_bytes(bytes(2**21))
    with pytest.raises(StoreUnavailableError, match=r"small .*No space left.*free space.*DEME_STORE_URI"):
        store.put_file("model/weights", tmp_path / "large")
    assert [path.name for path in (small_disk / "model").iterdir()] == ["weights"]
    assert store.get_bytes("model/weights") == b"old"


def test_a_full_cache_is_said_and_keeps_nothing(small_disk: Path, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    store.put_bytes("weights", bytes(2**21))
    with pytest.raises(StoreUnavailableError, match=r"small/cache/weights .*No space left.*DEME_HOME"):
        store.get_file("weights", small_disk / "cache" / "weights", max_bytes=2**21)
    assert list((small_disk / "cache").iterdir()) == []


def test_access_to_a_full_disk_is_refused(small_disk: Path) -> None:
    (small_disk / "fill").write_bytes(bytes(2**20))
    with pytest.raises(StoreUnavailableError, match="free space"):
        check_access(FileStore(small_disk))


def test_access_to_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    user = os.geteuid()
    if user == 0:  # whom no mode keeps out
        os.seteuid(65534)
    try:
        with pytest.raises(StoreUnavailableError, match=r"Permission denied.*permissions.*DEME_STORE_URI"):
            check_access(FileStore(tmp_path / "store"))
    finally:
        os.seteuid(user)


def test_access_to_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(StoreUnavailableError, match=f"{tmp_path}/store"):
        check_access(FileStore(tmp_path / "store"))
    with pytest.raises(StoreUnavailableError, match=f"{tmp_path}/store"):
        FileStore(tmp_path / "store").put_bytes("key", b"", if_absent=True)


def test_a_killed_writer_leaves_nothing_visible_nor_for_ever(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put_bytes("stage/whole", b"")
    half, empty = tmp_path / "stage" / ".tmp-killed", tmp_path / "gone" / "empty"
    half.write_bytes(b"half")
    empty.mkdir(parents=True)
    assert keys(store) == ["stage/whole"]
    store.discard_unfinished(datetime.now(UTC) - timedelta(hours=1))
    assert half.exists() and empty.exists()
    store.discard_unfinished(datetime.now(UTC) + timedelta(hours=1))
    assert not half.exists() and not empty.parent.exists()
    assert keys(store) == ["stage/whole"]


def test_a_file_uri_is_read_back(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "with space # and %")
    store.put_bytes("key", b"value")
    assert open_store(store.uri).uri == store.uri
    assert open_store(f"{store.uri}/").get_bytes("key") == b"value"


@pytest.mark.parametrize(
    ("uri", "normal"),
    [("s3://bucket", "s3://bucket"), ("s3://bucket/", "s3://bucket"), ("s3://bucket/a/b/", "s3://bucket/a/b")],
)
def test_an_s3_uri_is_bucket_and_prefix(uri: str, normal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = open_store(uri)
    assert isinstance(store, S3Store)
    assert (store.uri, store.place) == (normal, f"{normal} at http://127.0.0.1:1")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "store",
        "/store",
        "file://store",
        "file:",
        "s3://",
        "s3:///prefix",
        "s3://b/../c",
        "https://user:hush@host/bucket",
        "s3://KEY:hush@bucket/prefix",
        "s3://KEY@bucket",
        "s3://bucket:hush",
        "file:///hush%00",
    ],
)
def test_another_uri_is_refused_without_repeating_it(uri: str) -> None:
    with pytest.raises(InputError, match="DEME_STORE_URI") as caught:
        open_store(uri)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:8333", "http://user:hush@127.0.0.1:8333", "http://user:hush@bad host"])
def test_a_bad_endpoint_is_refused_without_repeating_it(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreUnavailableError, match="AWS_ENDPOINT_URL") as caught:
        open_store("s3://bucket")
    assert "hush" not in str(caught.value)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    (tmp_path / "store").mkdir()
    (tmp_path / "outside").write_text("told")
    return FileStore(tmp_path / "store")


def reads(store: FileStore, key: str) -> list[Callable[[], object]]:
    """Every way to read an object."""
    copy = store.folder.parent / "copy"
    return [
        lambda: store.get_file(key, copy, max_bytes=10),
        lambda: store.get_bytes(key),
        lambda: store.get_range(key, 0, 4),
        lambda: store.delete_if(key, b"told"),
    ]


@pytest.mark.parametrize("target", ["../outside", "/dev/zero"])
def test_a_link_that_leads_out_of_the_store_is_refused(store: FileStore, target: str) -> None:
    (store.folder / "key").symlink_to(target)
    *lookups, deletion = reads(store, "key")
    for read in lookups:
        with pytest.raises(ArtifactNotFoundError, match=f"{store.uri}/key is a link that leads out of the store"):
            read()
    assert deletion() is False
    assert not (store.folder.parent / "copy").exists()


def test_a_folder_that_leads_out_of_the_store_is_refused(store: FileStore) -> None:
    (store.folder / "up").symlink_to("..")
    others = (lambda: store.exists("up/outside"), lambda: store.delete("up/outside"))
    for act in (*reads(store, "up/outside"), *others, lambda: store.put_bytes("up/new", b"told")):
        with pytest.raises(InputError, match="lies outside of the store, where a link leads"):
            act()
    assert (store.folder.parent / "outside").exists()


def test_links_within_a_store_and_to_it_are_followed(store: FileStore, tmp_path: Path) -> None:
    store.put_bytes("real", b"told")
    (store.folder / "linked").symlink_to("real")
    (tmp_path / "elsewhere").symlink_to(store.folder)
    for found in (store, FileStore(tmp_path / "elsewhere")):
        found.get_file("linked", tmp_path / "copy", max_bytes=4)
        assert (tmp_path / "copy").read_text() == found.get_bytes("linked").decode() == "told"
        assert not (tmp_path / "copy").is_symlink()


@pytest.mark.timeout(20)
def test_a_pipe_is_no_object_and_is_not_waited_for(store: FileStore) -> None:
    os.mkfifo(store.folder / "key")
    *lookups, deletion = reads(store, "key")
    for read in lookups:
        with pytest.raises(ArtifactNotFoundError):
            read()
    assert deletion() is False


def test_a_file_that_grows_while_it_is_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The system says that this file is empty until somebody reads it.
    store = FileStore(Path("/proc/self"))
    with pytest.raises(ObjectTooLargeError, match="more than 10 bytes"):
        store.get_file("status", tmp_path / "copy", max_bytes=10)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(file_store, "MAX_BYTES_AT_ONCE", 10)
    with pytest.raises(ObjectTooLargeError, match="more than 10 bytes"):
        store.get_bytes("status")


def test_a_key_is_no_longer_than_s3_has_them(store: FileStore) -> None:
    deepest = "a/" * 511 + "aa"
    store.put_bytes(deepest, b"told")
    assert store.get_bytes(deepest) == b"told"
    for key in (f"{deepest}a", deepest.replace("aa", "aé"), "x/" * 2000 + "x"):
        with pytest.raises(ValueError, match="no object key"):
            store.get_bytes(key)


def test_boto3_is_loaded_by_those_who_need_it() -> None:
    command = "import sys, deme_core.store as s; s.open_store('file:///tmp'); sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


class Conflicts:
    """An S3 client whose conditional writes meet others', which write nothing in the end."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.meta = SimpleNamespace(endpoint_url="http://127.0.0.1:1")

    def put_object(self, **_: object) -> None:
        self.left -= 1
        if self.left >= 0:
            raise self._error(409, "ConditionalRequestConflict")

    def head_object(self, **_: object) -> None:
        raise self._error(404, "404")

    def _error(self, status: int, code: str) -> ClientError:
        return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]


def test_a_write_that_met_another_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[float]()
    monkeypatch.setattr("time.sleep", waits.append)
    make_client: Any = lambda: Conflicts(3)  # noqa: E731
    assert S3Store("bucket", "", make_client).put_bytes("key", b"", if_absent=True)
    assert len(waits) == 3
    make_client = lambda: Conflicts(100)  # noqa: E731
    with pytest.raises(StoreUnavailableError, match="409"):
        S3Store("bucket", "", make_client).put_bytes("key", b"", if_absent=True)


def test_an_object_is_on_the_disk_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen = FileStore(tmp_path), list[bool]()
    monkeypatch.setattr(file_store, "sync", lambda _: seen.append(store.exists("a")))
    store.put_bytes("a", b"new", if_absent=True)
    assert seen == [False]


def test_of_many_races_each_has_one_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_store, "sync", lambda _: None)  # Writers that wait for the disk hardly ever meet.
    store = FileStore(tmp_path)
    for number in range(100):
        wins = race(lambda writer, key=f"{number}": store.put_bytes(key, str(writer).encode(), if_absent=True))
        assert wins.count(True) == 1
