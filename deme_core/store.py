"""The object store: a local folder or an S3-compatible server, behind one contract.

Objects appear whole or not at all, and whatever an operating system or a server answers becomes a
``StoreUnavailableError`` of one sentence. Messages name the variables of credentials, never their values.
"""

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO, Protocol
from urllib.parse import unquote
from uuid import uuid4

from deme_core.errors import ArtifactNotFoundError, InputError, ObjectTooLargeError, StoreUnavailableError

_TEMPORARY_PREFIX = ".tmp-"
# Larger writes make the kernel look for huge pages, see deme_core.checkpoint.
_BYTES_PER_PIECE = 256 << 10
_ACCESS_DEADLINE_SEC = 25.0
_ACCESS_WAITS_SEC = (0.5, 1.0, 2.0, 4.0)
# What is read into memory at once, as manifests with their histories: more is no such thing.
MAX_BYTES_AT_ONCE = 64 * 2**20
_URI_RULE = "DEME_STORE_URI must be file:///FOLDER or s3://BUCKET/PREFIX."


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing.

    Attributes:
        key: its name, relative to the store.
        size: bytes.
        modified: when it was written, by the store's clock (aware).
    """

    key: str
    size: int
    modified: datetime


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
        """Read ``size`` bytes of an object, which has them; ArtifactNotFoundError if missing."""

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


class NoAnswerError(StoreUnavailableError):
    """No answer: another attempt may succeed, unlike after a refusal."""


class FileStore:
    """Objects are files below a folder, which the first write makes.

    Args:
        location: a ``file:///`` URI or a Path.
    """

    def __init__(self, location: str | Path) -> None:
        self.folder = _folder_of(location) if isinstance(location, str) else location.absolute()
        self.uri = self.place = self.folder.as_uri()

    def put_file(self, key: str, path: Path) -> None:
        """Copy a file into the folder."""
        with path.open("rb") as source:
            self._put(key, source)

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write bytes into the folder."""
        return self._put(key, BytesIO(data), if_absent=if_absent)

    def get_file(self, key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
        """Copy a file out; a link would let a change of the copy reach the store."""
        with (
            self._errors(key),
            self._open(key, max_bytes) as source,
            local_errors(path),
            temporary_beside(path) as temporary,
        ):
            _copy(source, temporary, digest)
            temporary.replace(path)

    def get_bytes(self, key: str) -> bytes:
        """Read a file."""
        with self._errors(key), self._open(key, MAX_BYTES_AT_ONCE) as file:
            return file.read()

    def get_range(self, key: str, offset: int, size: int) -> bytes:
        """Read a part of a file."""
        with self._errors(key), self._path(key).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        with self._errors():
            return self._path(key).is_file()

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Walk the deepest folder that holds every match."""
        parent = prefix.rpartition("/")[0]
        for path in self._walk(self._path(parent) if parent else self.folder):
            key = path.relative_to(self.folder).as_posix()
            if key.startswith(prefix) and is_key(key):
                # It may be deleted between the walk and the look.
                with self._errors(), suppress(FileNotFoundError):
                    status = path.stat()
                    if S_ISREG(status.st_mode):
                        yield StoredObject(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def delete(self, key: str) -> None:
        """Remove a file; its folder stays, for another writer may be about to use it."""
        with self._errors(), suppress(FileNotFoundError, NotADirectoryError):
            self._path(key).unlink()

    def delete_if(self, key: str, data: bytes) -> bool:
        """Remove a file that was just read; between the two is no time but that of a few system calls."""
        with suppress(ArtifactNotFoundError), self._errors(key):
            path = self._path(key)
            if path.read_bytes() == data:
                path.unlink()
                return True
        return False

    def discard_unfinished(self, before: datetime) -> None:
        """Remove old temporary files and old empty folders."""
        for path in self._walk(self.folder):
            with self._errors(), suppress(FileNotFoundError):
                if path.stat().st_mtime >= before.timestamp():
                    continue
                if path.is_dir():
                    # The system refuses to remove a folder that holds anything.
                    with suppress(OSError):
                        path.rmdir()
                elif not is_key(path.relative_to(self.folder).as_posix()):
                    path.unlink()

    def _put(self, key: str, source: BinaryIO, *, if_absent: bool = False) -> bool:
        path = self._path(key)
        with self._errors(), temporary_beside(path) as temporary:
            _copy(source, temporary)
            if not if_absent:
                temporary.replace(path)
                return True
            try:
                # Unlike a rename, a link never replaces: of several writers one succeeds.
                os.link(temporary, path)
            except FileExistsError:
                return False
        return True

    def _path(self, key: str) -> Path:
        return self.folder / check_key(key)

    def _open(self, key: str, max_bytes: int) -> BinaryIO:
        file = self._path(key).open("rb")
        if os.fstat(file.fileno()).st_size > max_bytes:
            file.close()
            raise too_large(f"{self.uri}/{key}", max_bytes)
        return file

    def _walk(self, folder: Path) -> Iterator[Path]:
        """All files and folders below a folder, the deepest first."""

        def pass_on(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        with self._errors():
            for parent, _, names in os.walk(folder, topdown=False, onerror=pass_on):
                yield from (Path(parent, name) for name in names)
                yield Path(parent)

    @contextmanager
    def _errors(self, key: str | None = None) -> Iterator[None]:
        """Translate the system's errors; where a key is given, a missing file means a missing object."""
        with system_errors(self.place, "point DEME_STORE_URI elsewhere"):
            try:
                yield
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
                if key is None:
                    raise
                raise not_found(f"{self.uri}/{key}") from error


def open_store(uri: str) -> ObjectStore:
    """Open ``file:///folder`` or ``s3://bucket/prefix``; any other URI is an InputError.

    Nothing is contacted yet. S3 endpoint and credentials come from the standard AWS_* variables, which boto3 reads;
    where no client can be made from them that is a StoreUnavailableError.
    """
    if uri.startswith("file://"):
        return FileStore(uri)
    s3_uri = re.fullmatch(r"s3://([A-Za-z0-9._-]+)/*(.*?)/*", uri)
    if s3_uri is None or (s3_uri[2] and not is_key(s3_uri[2])):
        raise InputError(_URI_RULE)
    from deme_core.s3_store import connect  # boto3 takes half a second to import.

    return connect(s3_uri[1], s3_uri[2])


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
    """Whether this can name an object: a plain relative POSIX path, and no temporary file."""
    parts = key.split("/")
    bad = any(part in ("", ".", "..") or part.startswith(_TEMPORARY_PREFIX) for part in parts)
    return not bad and "\\" not in key and "\0" not in key


def check_key(key: str) -> str:
    """Return a valid key; any other is a ValueError."""
    if not is_key(key):
        raise ValueError(f"{key!r} is no object key: it must be a plain relative path.")
    return key


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a new name in the folder of ``path``; whatever bears it in the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY_PREFIX}{uuid4().hex}")
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


@contextmanager
def system_errors(place: str, remedy: str) -> Iterator[None]:
    """Turn the system's refusal into one sentence: where, why and what to do."""
    try:
        yield
    except OSError as error:
        first = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check its permissions"
        reason = error.strerror or type(error).__name__
        raise StoreUnavailableError(f"Cannot use {place} ({reason}); {first} or {remedy}.") from error


def check_space(folder: Path, num_bytes: int, *, variable: str = "DEME_HOME") -> None:
    """Raises StoreUnavailableError if the disk of a folder that exists has no room for so much.

    Args:
        folder: where it shall go.
        num_bytes: how much.
        variable: what moves the folder elsewhere.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise StoreUnavailableError(
            f"Cannot use {folder.parent} ({num_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free); free "
            f"space or point {variable} elsewhere."
        )


def local_errors(path: Path) -> AbstractContextManager[None]:
    """The same for a file of the local cache."""
    return system_errors(str(path), "point DEME_HOME elsewhere")


def _copy(source: BinaryIO, path: Path, digest: Digest | None = None) -> None:
    with path.open("xb") as file:
        while piece := source.read(_BYTES_PER_PIECE):
            file.write(piece)
            if digest is not None:
                digest.update(piece)
    sync(path)


def sync(path: Path) -> None:
    """Waits until a file is on the disk: else a power cut after a rename leaves its name without its bytes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _folder_of(uri: str) -> Path:
    path = unquote(uri.removeprefix("file://"))
    if not uri.startswith("file://") or not path.startswith("/"):
        raise InputError(_URI_RULE)
    return Path(path)


def too_large(uri: str, max_bytes: int) -> ObjectTooLargeError:
    """Returns the error for an object that is larger than it may be."""
    return ObjectTooLargeError(f"{uri} holds more than {max_bytes} bytes, which is no object that DeMe reads so.")


def not_found(uri: str) -> ArtifactNotFoundError:
    """Returns the error for an object that is not there."""
    return ArtifactNotFoundError(f"{uri} is not in the object store; run the stage that makes it again.")
