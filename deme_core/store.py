"""The object store: a local folder or an S3-compatible server, behind one contract.

Objects appear whole or not at all, and whatever an operating system or a server answers becomes a
``StoreUnavailableError`` of one sentence. Messages name the variables of credentials, never their values.
"""

import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote
from uuid import uuid4

from deme_core.errors import (
    ArtifactNotFoundError,
    InputError,
    NoAnswerError,
    ObjectTooLargeError,
    StoreUnavailableError,
)
from deme_core.local_files import TEMPORARY_PREFIX

_ACCESS_DEADLINE_SEC = 25.0
_ACCESS_WAITS_SEC = (0.5, 1.0, 2.0, 4.0)
# What is read into memory at once, as manifests with their histories: more is no such thing.
MAX_BYTES_AT_ONCE = 64 * 2**20
# S3 takes no longer one, and what is as deep as that would exhaust the stack of whoever makes its folders.
_MAX_BYTES_OF_KEY = 1024
URI_RULE = "DEME_STORE_URI must be file:///FOLDER or s3://BUCKET/PREFIX."


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing.

    Attributes:
        key: its name, relative to the store.
        size: bytes.
        modified: when it was written, by the store's clock (aware).
        version: another one whenever the object may hold other bytes, opaque; empty where a server tells none.
    """

    key: str
    size: int
    modified: datetime
    version: str

    @property
    def identity(self) -> tuple[str, int, str, str]:
        """All of it, for JSON: names copies and indices of these bytes, and no result, which may come from others."""
        return self.key, self.size, self.modified.isoformat(), self.version


class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> None:
        """Takes the next bytes."""


class ObjectStore(Protocol):
    """Named byte strings; keys are relative POSIX paths. Every method may raise StoreUnavailableError."""

    @property
    def uri(self) -> str:
        """Address without a trailing slash."""

    @property
    def place(self) -> str:
        """What messages call the store: its URI, and the endpoint where there is one."""

    def put_file(self, key: str, path: Path) -> None:
        """Store a local file, replacing what is there."""

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Store bytes; with ``if_absent`` one writer of a race wins and the others get False."""

    def get_file(self, key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
        """Download to ``path``, which appears whole or not at all; ArtifactNotFoundError if missing.

        ``digest`` is given all bytes, in order, while others still arrive. An object larger than ``max_bytes`` is an
        ObjectTooLargeError, raised before it is downloaded. A store that keeps checksums of its own raises
        ChecksumMismatchError where they do not hold.
        """

    def get_bytes(self, key: str) -> bytes:
        """Read a small object; ArtifactNotFoundError if missing, ObjectTooLargeError beyond MAX_BYTES_AT_ONCE."""

    def get_range(self, key: str, offset: int, size: int) -> bytes:
        """Read ``size`` bytes of an object, fewer where it ends; ArtifactNotFoundError if missing."""

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """All objects whose key starts with the string ``prefix``, in no particular order."""

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is fine."""

    def delete_if(self, key: str, data: bytes) -> bool:
        """Remove an object if it still holds ``data``; whether it did.

        A writer that comes between the look and the removal may lose what it wrote, unless the store can tell.
        """

    def discard_unfinished(self, before: datetime) -> None:
        """Free what writers that died before that time left behind: not objects, but they take space."""


def open_store(uri: str) -> ObjectStore:
    """Open ``file:///folder`` or ``s3://bucket/prefix``; any other URI is an InputError, which does not repeat it.

    Nothing is contacted yet. S3 endpoint and credentials come from the standard AWS_* variables, which boto3 reads;
    where no client can be made from them that is a StoreUnavailableError.
    """
    if uri.startswith("file://"):
        from deme_core.file_store import FileStore  # It needs this module.

        return FileStore(uri)
    # What follows the bucket begins with a slash: else KEY:SECRET@BUCKET would be a bucket and its prefix.
    s3_uri = re.fullmatch(r"s3://([A-Za-z0-9._-]+)(?:/+(.*?))?/*", uri)
    if s3_uri is None or (s3_uri[2] and not is_key(s3_uri[2])):
        raise InputError(URI_RULE)
    from deme_core.s3_store import connect  # boto3 takes half a second to import.

    return connect(s3_uri[1], s3_uri[2] or "")


def folder_and_key(uri: str) -> tuple[str, str]:
    """Returns the URI of an object's folder and its key there; a name in a ``file:`` URI is percent-encoded."""
    folder, _, name = uri.rpartition("/")
    return folder, unquote(name) if uri.startswith("file://") else name


def check_access(store: ObjectStore) -> None:
    """Write, read and delete one small object, so that a run fails at its start and not at its end.

    If that cannot be done, StoreUnavailableError says within 30 seconds which address and variable to correct.
    """
    outcome: Future[None] = Future()

    def probe() -> None:
        try:
            _probe_patiently(store)
            outcome.set_result(None)
        except Exception as error:
            outcome.set_exception(error)

    # A thread of its own, for a call may hang; a daemon, for it must not keep the process from ending.
    threading.Thread(target=probe, daemon=True).start()
    try:
        outcome.result(timeout=_ACCESS_DEADLINE_SEC)
    except TimeoutError as error:
        mend = "check that it is up, AWS_ENDPOINT_URL and DEME_STORE_URI"
        raise StoreUnavailableError(f"No answer from {store.place} in {_ACCESS_DEADLINE_SEC:.0f} s; {mend}.") from error


def _probe_patiently(store: ObjectStore) -> None:
    # boto3's own attempts are over within a fraction of a second: a server that is just starting needs longer.
    for wait_sec in _ACCESS_WAITS_SEC:
        try:
            return _probe(store)
        except NoAnswerError:
            time.sleep(wait_sec)
    return _probe(store)


def _probe(store: ObjectStore) -> None:
    key, data = f".access-check/{uuid4().hex}", os.urandom(16)
    store.put_bytes(key, data)
    kept = store.exists(key) and store.get_bytes(key) == data
    store.delete(key)
    if not kept:
        raise StoreUnavailableError(f"{store.place} does not return what is written to it; correct DEME_STORE_URI.")


def store_time(store: ObjectStore) -> datetime:
    """Returns the time by the clock that dates the store's objects: this machine's may be wrong, or jump."""
    key = f".clock/{uuid4().hex}"
    store.put_bytes(key, b"")
    try:
        return max(found.modified for found in store.list(key))
    finally:
        store.delete(key)


def is_key(key: str) -> bool:
    """Whether this can name an object: a plain relative POSIX path of at most 1024 bytes, and no temporary file."""
    parts = key.split("/")
    bad = any(part in ("", ".", "..") or part.startswith(TEMPORARY_PREFIX) for part in parts)
    is_short = len(key.encode(errors="surrogatepass")) <= _MAX_BYTES_OF_KEY
    return not bad and is_short and "\\" not in key and "\0" not in key


def check_key(key: str) -> str:
    """Return a valid key; any other is a ValueError."""
    if not is_key(key):
        raise ValueError(
            f"{key!r} is no object key: it must be a plain relative path of at most {_MAX_BYTES_OF_KEY} bytes."
        )
    return key


def too_large(uri: str, max_bytes: int) -> ObjectTooLargeError:
    """Returns the error for an object that is larger than it may be."""
    return ObjectTooLargeError(f"{uri} holds more than {max_bytes} bytes, which is no object that DeMe reads so.")


def not_found(uri: str) -> ArtifactNotFoundError:
    """Returns the error for an object that is not there."""
    return ArtifactNotFoundError(f"{uri} is not in the object store; run the stage that makes it again.")
