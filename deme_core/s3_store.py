"""The object store on an S3-compatible server."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, IncompleteReadError

from deme_core.errors import ArtifactNotFoundError, ChecksumMismatchError
from deme_core.local_files import local_errors, sync, temporary_beside
from deme_core.s3_client import MAX_ATTEMPTS, make_client, no_answer, refusal, status
from deme_core.store import (
    MAX_BYTES_AT_ONCE,
    Digest,
    StoredObject,
    check_key,
    is_key,
    not_found,
    too_large,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Measured in benchmarks/store.py: boto3's own download_file is half as fast, and pieces of a megabyte, which make the
# kernel look for huge pages, a third.
_PART_BYTES, _PIECE_BYTES, _NUM_PARTS_AT_ONCE = 16 << 20, 256 << 10, 8
_LARGE_BYTES = 8 << 20
_FRUITLESS_ATTEMPTS = 5
_WAITS_AFTER_CONFLICT_SEC = (0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class _Connections:
    """What belongs to one process: one that is forked from it would share its sockets, and has none of its threads.

    Attributes:
        process: its id.
        client: a boto3 client.
        threads: what downloads parts, of all files together.
    """

    process: int
    client: "S3Client"
    threads: ThreadPoolExecutor


class S3Store:
    """Objects of a bucket whose keys start with a prefix; usable in forked processes too.

    Args:
        bucket: its name.
        prefix: a path without outer slashes, or nothing.
        make_client: makes a boto3 client.
    """

    def __init__(self, bucket: str, prefix: str, make_client: Callable[[], "S3Client"]) -> None:
        self._bucket, self._root, self._make_client = bucket, f"{prefix}/" if prefix else "", make_client
        self._connections, self._lock = self._connect(), Lock()
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self.place = f"{self.uri} at {self._client.meta.endpoint_url}"

    def _connect(self) -> _Connections:
        threads = ThreadPoolExecutor(_NUM_PARTS_AT_ONCE, thread_name_prefix="s3-part")
        return _Connections(os.getpid(), self._make_client(), threads)

    @property
    def _own(self) -> _Connections:
        if self._connections.process != os.getpid():
            with self._lock:  # Taken by forked processes alone, so that none is forked while it is held.
                if self._connections.process != os.getpid():
                    self._connections = self._connect()
        return self._connections

    @property
    def _client(self) -> "S3Client":
        return self._own.client

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file, in parts if it is large: memory stays bounded."""
        with self._errors():
            if path.stat().st_size >= _LARGE_BYTES:
                self._client.upload_file(str(path), self._bucket, self._name(key))
                return
            # upload_file starts threads of its own, which takes three times as long as the request.
            self._client.put_object(Bucket=self._bucket, Key=self._name(key), Body=path.read_bytes())

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Upload bytes in one request."""
        with self._errors():
            if not if_absent:
                self._client.put_object(Bucket=self._bucket, Key=self._name(key), Body=data)
                return True
            for wait_sec in (*_WAITS_AFTER_CONFLICT_SEC, None):
                try:
                    self._client.put_object(Bucket=self._bucket, Key=self._name(key), Body=data, IfNoneMatch="*")
                except ClientError as error:
                    code = status(error)
                    # 409 means that another request interfered; only one that wrote the object has won.
                    if code == 412 or (code == 409 and self.exists(key)):
                        return False
                    if code != 409 or wait_sec is None:
                        raise
                    time.sleep(wait_sec)
                else:
                    break
        return True

    def get_file(self, key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
        """Download a file, in parts side by side if it is large, all of one version of the object."""
        with self._errors(key), local_errors(path), temporary_beside(path) as temporary:
            temporary.touch()
            self._download(self._name(key), temporary, digest, max_bytes)
            sync(temporary)
            temporary.replace(path)

    def _download(self, name: str, path: Path, digest: Digest | None, max_bytes: int) -> None:
        first = self._begin(name, 0, _PART_BYTES)
        if first is None:
            return
        size, version = _object_size(first), first["ETag"]
        if size > max_bytes:
            first["Body"].close()
            raise too_large(f"{self.uri}/{name.removeprefix(self._root)}", max_bytes)
        got = min(size, _PART_BYTES) if "ContentRange" in first else size
        rest = [
            self._own.threads.submit(self._get_part, name, path, low, min(low + _PART_BYTES, size), version)
            for low in range(got, size, _PART_BYTES)
        ]
        try:
            self._get_part(name, path, 0, got, version, first)
            with path.open("rb") as written:
                _feed(digest, written, got)
                for part in rest:
                    part.result()
                    _feed(digest, written, _PART_BYTES)
        finally:
            for part in rest:
                part.cancel()
            wait(rest)  # Before anyone removes the file.

    def _begin(self, name: str, low: int, high: int) -> Any:
        """Ask for the bytes [low, high) of an object; None where it ends before them."""
        try:
            return self._client.get_object(Bucket=self._bucket, Key=name, Range=f"bytes={low}-{high - 1}")
        except ClientError as error:
            if status(error) == 416:
                return None
            raise

    def _get_part(self, name: str, path: Path, low: int, high: int, version: str, answer: Any = None) -> None:
        """Write the bytes [low, high) of an object into a file."""
        with path.open("r+b") as file:
            file.seek(low)
            for piece in self._pieces(name, low, high, version, answer):
                file.write(piece)

    def _pieces(self, name: str, low: int, high: int, version: str, answer: Any = None) -> Iterator[bytes]:
        """Yield the bytes [low, high) of one version of an object; where a body ends early, go on from there."""
        position, reached, failures = low, low, 0
        while True:
            if answer is None:
                bounds = f"bytes={position}-{high - 1}"
                answer = self._client.get_object(Bucket=self._bucket, Key=name, Range=bounds, IfMatch=version)
            # A server that knows no ranges sends everything.
            at = position if "ContentRange" in answer else 0
            try:
                with answer["Body"]:
                    for piece in answer["Body"].iter_chunks(_PIECE_BYTES):
                        wanted = piece[max(position - at, 0) : max(high - at, 0)]
                        at, position = at + len(piece), position + len(wanted)
                        yield wanted
                if position < high:  # Its headers announced no more, and so nobody missed the rest.
                    raise IncompleteReadError(actual_bytes=position - low, expected_bytes=high - low)
                return
            except BotoCoreError:
                failures = 0 if position > reached else failures + 1
                if failures == _FRUITLESS_ATTEMPTS or position >= high:
                    raise
                reached, answer = position, None

    def get_bytes(self, key: str) -> bytes:
        """Download in one request; in some more if the connection is cut while the body comes."""
        with self._errors(key):
            for attempt in range(1, MAX_ATTEMPTS + 1):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._name(key))
                if answer["ContentLength"] > MAX_BYTES_AT_ONCE:
                    answer["Body"].close()
                    raise too_large(f"{self.uri}/{key}", MAX_BYTES_AT_ONCE)
                try:
                    return answer["Body"].read()
                except BotoCoreError:  # boto3 itself tries again only as long as there is no answer.
                    if attempt == MAX_ATTEMPTS:
                        raise
            raise AssertionError

    def get_range(self, key: str, offset: int, size: int) -> bytes:
        """Download a part, in some more requests than one if the connection is cut; less where the object ends."""
        name = self._name(key)
        with self._errors(key):
            if (first := self._begin(name, offset, offset + size)) is None:
                return b""
            high = min(offset + size, _object_size(first))
            return b"".join(self._pieces(name, offset, high, first["ETag"], first))

    def exists(self, key: str) -> bool:
        """Ask for the object's head."""
        try:
            with self._errors(key):
                self._client.head_object(Bucket=self._bucket, Key=self._name(key))
        except ArtifactNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """List page by page."""
        with self._errors():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._root + prefix):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self._root)
                    # Some tools mark folders by empty objects whose key ends in a slash.
                    if is_key(key):
                        # The time is in whole seconds, so the ETag alone tells two of one second apart.
                        yield StoredObject(key, entry["Size"], entry["LastModified"], entry.get("ETag", ""))

    def delete(self, key: str) -> None:
        """Delete; S3 does not mind a missing object."""
        with self._errors():
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def delete_if(self, key: str, data: bytes) -> bool:
        """Delete the version that was just read; a server that knows no conditional deletes deletes any."""
        name = self._name(key)
        with suppress(ArtifactNotFoundError), self._errors(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=name)
            if answer["ContentLength"] != len(data) or answer["Body"].read() != data:
                answer["Body"].close()
                return False
            try:
                self._client.delete_object(Bucket=self._bucket, Key=name, IfMatch=answer["ETag"])
                return True
            except ClientError as error:
                if status(error) not in (409, 412):
                    raise
        return False

    def discard_unfinished(self, before: datetime) -> None:
        """Abort old multipart uploads: their parts take space until then."""
        with self._errors():
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._root):
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"] < before:
                        # Whoever uploads may finish at the same moment.
                        with suppress(ArtifactNotFoundError), self._errors(upload["Key"]):
                            self._client.abort_multipart_upload(
                                Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                            )

    def _name(self, key: str) -> str:
        return self._root + check_key(key)

    @contextmanager
    def _errors(self, key: str | None = None) -> Iterator[None]:
        """Translate what boto3 raises; where a key is given, 404 means a missing object."""
        try:
            yield
        except FlexibleChecksumError as error:
            # The server's own checksum of the object; what the two are tells one kind of damage from another.
            raise ChecksumMismatchError(f"{self.uri}/{key} is not what was stored: {error}.") from error
        except (Boto3Error, BotoCoreError, ClientError) as error:
            # upload_file hides the answer that it got behind an error of its own.
            cause = error.__context__ if isinstance(error, Boto3Error) else error
            if not isinstance(cause, ClientError):
                raise no_answer(self.place, error) from error
            if key is not None and status(cause) == 404 and cause.response["Error"]["Code"] != "NoSuchBucket":
                raise not_found(f"{self.uri}/{key}") from error
            raise refusal(self.place, cause) from error


def _feed(digest: Digest | None, file: BinaryIO, num_bytes: int) -> None:
    """Give the next bytes of a file, or what it still has, to a digest."""
    while digest is not None and num_bytes > 0 and (piece := file.read(min(num_bytes, _PIECE_BYTES))):
        digest.update(piece)
        num_bytes -= len(piece)


def _object_size(answer: Any) -> int:
    # Without a range the answer is the whole object. The length alone may be that of what a proxy passes on.
    whole = "ContentRange" not in answer
    return int(answer["ContentLength"] if whole else answer["ContentRange"].rpartition("/")[2])


def connect(bucket: str, prefix: str) -> S3Store:
    """Opens a bucket at the endpoint and with the credentials of the AWS_* variables; contacts nothing yet."""
    return S3Store(bucket, prefix, partial(make_client, num_connections=2 * _NUM_PARTS_AT_ONCE))
