import hashlib
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import uuid4

import pytest

from deme_core import store as store_module
from deme_core.errors import NoAnswerError, StoreUnavailableError
from deme_core.s3_store import S3Store, connect
from deme_core.store import ObjectStore, StoredObject, check_access, open_store
from tests.http_server import serving, url_of
from tests.integration.conftest import S3Server
from tests.own_process import succeeds
from tests.store_contract import ArtifactContract, StoreContract, keys

AGREED_SEC = 30.0


@pytest.fixture(scope="session")
def bucket(s3_server: S3Server) -> str:
    return s3_server.make_bucket("contract")


@pytest.fixture(autouse=True)
def environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(bucket: str) -> ObjectStore:
    return open_store(f"s3://{bucket}/test-{uuid4().hex}/prefix")


class TestS3Store(StoreContract):
    pass


class TestArtifactsInS3(ArtifactContract):
    pass


def refusal(act: Callable[[], object], server: S3Server) -> str:
    """The one sentence an unusable store is reported by, in time and without secrets."""
    start = time.monotonic()
    with pytest.raises(StoreUnavailableError) as caught:
        act()
    assert time.monotonic() - start < AGREED_SEC
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    assert server.access_key not in message and server.secret_key not in message
    return message


def test_a_bucket_without_a_prefix_is_a_store(s3_server: S3Server) -> None:
    store = open_store(f"s3://{s3_server.make_bucket('whole')}")
    check_access(store)
    store.put_bytes("a/b", b"1")
    assert keys(store) == ["a/b"]
    assert store.uri == "s3://whole"


def test_a_server_that_lists_no_etags_is_listed() -> None:
    now = datetime.now(UTC)
    pages = [{"Contents": [{"Key": "a", "Size": 1, "LastModified": now}]}]
    listing = SimpleNamespace(paginate=lambda **_: pages)
    client: Any = SimpleNamespace(meta=SimpleNamespace(endpoint_url=""), get_paginator=lambda _: listing)
    assert list(S3Store("bucket", "", lambda: client).list("")) == [StoredObject("a", 1, now, "")]


def test_a_wrong_secret_is_said(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-hush")
    store = open_store(f"s3://{bucket}")
    message = refusal(lambda: check_access(store), s3_server)
    assert s3_server.endpoint_url in message and "AWS_SECRET_ACCESS_KEY" in message and "hush" not in message


def test_an_unknown_key_is_said(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody-hush")
    message = refusal(lambda: check_access(open_store(f"s3://{bucket}")), s3_server)
    assert "AWS_ACCESS_KEY_ID" in message and "hush" not in message


def test_missing_credentials_are_said(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    message = refusal(lambda: check_access(open_store(f"s3://{bucket}")), s3_server)
    assert s3_server.endpoint_url in message and "set AWS_ACCESS_KEY_ID" in message


def test_a_missing_bucket_is_said(s3_server: S3Server) -> None:
    message = refusal(lambda: check_access(open_store("s3://nowhere/prefix")), s3_server)
    assert "s3://nowhere/prefix" in message and s3_server.endpoint_url in message and "DEME_STORE_URI" in message


def test_an_unreachable_port_is_said(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # Bound but not listening: refused for as long as the socket lives, whoever looks for a free port.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        message = refusal(lambda: check_access(open_store("s3://bucket")), s3_server)
    assert endpoint in message and "AWS_ENDPOINT_URL" in message


def relay(front: socket.socket, back: tuple[str, int], after_sec: float) -> None:
    """Listen on a bound socket only after a while, then pass each connection on."""
    time.sleep(after_sec)
    front.listen()
    with suppress(OSError):  # raised when the test closes the socket
        while True:
            ends = front.accept()[0], socket.create_connection(back)
            for source, target in (ends, ends[::-1]):
                threading.Thread(target=copy_stream, args=(source, target), daemon=True).start()


def copy_stream(source: socket.socket, target: socket.socket) -> None:
    with source, suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)


def test_a_server_that_is_just_starting_is_waited_for(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, port = s3_server.endpoint_url.removeprefix("http://").split(":")
    with socket.socket() as front:
        front.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{front.getsockname()[1]}")
        threading.Thread(target=relay, args=(front, (host, int(port)), 1.0), daemon=True).start()
        check_access(open_store(f"s3://{bucket}"))


def test_a_server_that_never_answers_is_said(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_ACCESS_DEADLINE_SEC", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        message = refusal(lambda: check_access(open_store("s3://bucket")), s3_server)
    assert endpoint in message and "AWS_ENDPOINT_URL" in message


def test_a_server_of_something_else_is_said(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "deme_core.store._ACCESS_WAITS_SEC", (0.1, 0.1)
    )  # test_an_unreachable_port_is_said takes all of it.
    with serving(BaseHTTPRequestHandler) as other:
        endpoint = url_of(other)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        message = refusal(lambda: check_access(open_store("s3://bucket")), s3_server)
    assert endpoint in message and "AWS_ENDPOINT_URL" in message


def test_what_is_written_between_the_look_and_the_deletion_stays(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = connect(bucket, f"test-{uuid4().hex}")
    store.put_bytes("key", b"old")
    get_object = store._client.get_object

    def get_and_replace(**arguments: Any) -> Any:
        answer = get_object(**arguments)
        store.put_bytes("key", b"new")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(store._client, "get_object", get_and_replace)
        assert not store.delete_if("key", b"old")
    assert store.get_bytes("key") == b"new"


class CuttingHandler(BaseHTTPRequestHandler):
    """Serves one object, and cuts the connection in the middle of every body that is larger than a megabyte."""

    content: bytes = b""
    version: str = '"1"'
    cut: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        low, high = map(int, wanted.removeprefix("bytes=").split("-"))
        if self.headers.get("If-Match", self.version) != self.version:
            self.send_error(412)
            return
        body = self.content[low : high + 1]
        self.send_response(206)
        self.send_header("ETag", self.version)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {low}-{low + len(body) - 1}/{len(self.content)}")
        self.end_headers()
        self.cut.add(wanted)
        self.wfile.write(body if len(body) < 2**20 else body[: len(body) // 2])

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_a_body_that_is_cut_is_gone_on_with_and_a_changed_object_is_no_mixture(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CuttingHandler.content = os.urandom(33 * 2**20 + 5)
    with serving(CuttingHandler) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url_of(server))
        store, digest = open_store("s3://bucket"), hashlib.sha256()
        store.get_file("key", tmp_path / "target", digest, max_bytes=2**26)
        assert (tmp_path / "target").read_bytes() == CuttingHandler.content
        assert digest.digest() == hashlib.sha256(CuttingHandler.content).digest()
        assert len(CuttingHandler.cut) > 9

        class Changing(CuttingHandler):
            def send_header(self, keyword: str, value: str) -> None:
                super().send_header(keyword, value)
                if keyword == "ETag":
                    CuttingHandler.version = '"2"'  # The next part is of another version.

        server.RequestHandlerClass = Changing
        with pytest.raises(StoreUnavailableError, match="412"):
            store.get_file("key", tmp_path / "other", max_bytes=2**26)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


class ShorteningHandler(CuttingHandler):
    """Serves less of a body than was asked for, and announces no more: nothing on the way sees that it ended early."""

    most: ClassVar[int] = 2**20

    def do_GET(self) -> None:
        low, high = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body = self.content[low : min(high + 1, low + self.most)]
        self.send_response(206)
        self.send_header("ETag", self.version)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {low}-{high}/{len(self.content)}")
        self.end_headers()
        self.wfile.write(body)


def test_a_body_that_ends_early_without_a_word_is_gone_on_with_or_said(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CuttingHandler, "content", os.urandom(17 * 2**20 + 5))
    with serving(ShorteningHandler) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url_of(server))
        store, digest = open_store("s3://bucket"), hashlib.sha256()
        store.get_file("key", tmp_path / "target", digest, max_bytes=2**26)
        assert (tmp_path / "target").read_bytes() == CuttingHandler.content
        assert digest.digest() == hashlib.sha256(CuttingHandler.content).digest()
        monkeypatch.setattr(ShorteningHandler, "most", 0)
        with pytest.raises(NoAnswerError, match="IncompleteReadError"):
            store.get_file("key", tmp_path / "other", max_bytes=2**26)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("handler", [CuttingHandler, ShorteningHandler])
def test_a_part_that_ends_early_is_gone_on_with_or_said(
    handler: type[CuttingHandler], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CuttingHandler, "content", content := os.urandom(5 * 2**20))
    with serving(handler) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url_of(server))
        store = open_store("s3://bucket")
        assert store.get_range("key", 7, 3 * 2**20) == content[7 : 7 + 3 * 2**20]
        monkeypatch.setattr(ShorteningHandler, "most", 0)
        if handler is ShorteningHandler:
            with pytest.raises(NoAnswerError, match="IncompleteReadError"):
                store.get_range("key", 7, 9)


class NotingHandler(CuttingHandler):
    """Keeps connections open, and notes for each request which one it came by."""

    protocol_version = "HTTP/1.1"
    connections: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        self.connections.append(self.client_address[1])
        super().do_GET()


def _read_and_fork() -> None:
    store = open_store("s3://bucket")

    def read() -> None:
        for _ in range(2):
            assert store.get_range("key", 3, 4) == b"3456"

    read()
    child = multiprocessing.get_context("fork").Process(target=read)
    child.start()
    child.join()
    assert child.exitcode == 0


def test_a_forked_process_has_connections_of_its_own(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CuttingHandler, "content", b"0123456789")
    with serving(NotingHandler) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url_of(server))
        assert succeeds(_read_and_fork, seconds=60)
    first, second, third, fourth = NotingHandler.connections
    assert first == second != third == fourth


def test_every_method_says_what_is_wrong(
    s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = open_store(f"s3://{bucket}")
    (tmp_path / "source").write_bytes(b"1")
    for act in (
        lambda: store.put_file("key", tmp_path / "source"),
        lambda: store.put_bytes("key", b"1"),
        lambda: store.put_bytes("key", b"1", if_absent=True),
        lambda: store.get_file("key", tmp_path / "target", max_bytes=1),
        lambda: store.get_bytes("key"),
        lambda: store.exists("key"),
        lambda: list(store.list("")),
        lambda: store.delete("key"),
        lambda: store.discard_unfinished(datetime.now(UTC)),
    ):
        assert "denies access" in refusal(act, s3_server)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_killed_upload_in_parts_is_discarded(s3_server: S3Server, bucket: str, store: ObjectStore) -> None:
    prefix = store.uri.removeprefix(f"s3://{bucket}/")
    s3_server.client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/killed")

    def num_open() -> int:
        answer = s3_server.client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)
        return len(answer.get("Uploads", ()))

    assert keys(store) == []
    store.discard_unfinished(datetime.now(UTC) - timedelta(hours=1))
    assert num_open() == 1
    store.discard_unfinished(datetime.now(UTC) + timedelta(hours=1))
    assert num_open() == 0


def test_a_listing_has_many_pages(s3_server: S3Server, bucket: str, store: ObjectStore) -> None:
    names = {f"{number:04}" for number in range(1005)}
    prefix = store.uri.removeprefix(f"s3://{bucket}/")
    for name in names:
        s3_server.client.put_object(Bucket=bucket, Key=f"{prefix}/many/{name}", Body=b"")
    assert {key.removeprefix("many/") for key in keys(store, "many/")} == names


def test_a_foreign_folder_marker_is_no_object(s3_server: S3Server, bucket: str, store: ObjectStore) -> None:
    prefix = store.uri.removeprefix(f"s3://{bucket}/")
    s3_server.client.put_object(Bucket=bucket, Key=f"{prefix}/folder/", Body=b"")
    assert keys(store) == []
