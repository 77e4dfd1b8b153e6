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
from typing import TYPE_CHECKING, BinaryIO, Protocol
from urllib.parse import unquote
from uuid import uuid4

from deme_core.errors import ArtifactNotFoundError, InputError, StoreUnavailableError

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from mypy_boto3_s3 import S3Client

_TEMPORARY_PREFIX = ".tmp-"
_ACCESS_DEADLINE_SEC = 25.0
_ACCESS_WAITS_SEC = (0.5, 1.0, 2.0, 4.0)
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

    def get_file(self, key: str, path: Path) -> None:
        """Download to ``path``, which appears whole or not at all; ArtifactNotFoundError if missing."""

    def get_bytes(self, key: str) -> bytes:
        """Read a small object; ArtifactNotFoundError if missing."""

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """All objects whose key starts with the string ``prefix``, in no particular order."""

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is fine."""

    def discard_unfinished(self, before: datetime) -> None:
        """Free what writers that died before that time left behind: not objects, but they take space."""


class _NoAnswerError(StoreUnavailableError):
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

    def get_file(self, key: str, path: Path) -> None:
        """Copy a file out; a link would let a change of the copy reach the store."""
        with (
            self._errors(key),
            self._path(key).open("rb") as source,
            local_errors(path),
            temporary_beside(path) as temporary,
        ):
            _copy(source, temporary)
            temporary.replace(path)

    def get_bytes(self, key: str) -> bytes:
        """Read a file."""
        with self._errors(key):
            return self._path(key).read_bytes()

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
                raise _not_found(f"{self.uri}/{key}") from error


class S3Store:
    """Objects of a bucket whose keys start with a prefix.

    Args:
        bucket: its name.
        prefix: a path without outer slashes, or nothing.
        client: a boto3 client.
    """

    def __init__(self, bucket: str, prefix: str, client: "S3Client") -> None:
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self.place = f"{self.uri} at {client.meta.endpoint_url}"
        self._bucket, self._root, self._client = bucket, f"{prefix}/" if prefix else "", client

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file, in parts if it is large: memory stays bounded."""
        with self._errors():
            self._client.upload_file(str(path), self._bucket, self._name(key))

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Upload bytes in one request."""
        from botocore.exceptions import ClientError

        with self._errors():
            if not if_absent:
                self._client.put_object(Bucket=self._bucket, Key=self._name(key), Body=data)
                return True
            try:
                self._client.put_object(Bucket=self._bucket, Key=self._name(key), Body=data, IfNoneMatch="*")
            except ClientError as error:
                status = _status(error)
                # 409 means that another request interfered; only one that wrote the object has won.
                if status == 412 or (status == 409 and self.exists(key)):
                    return False
                raise
        return True

    def get_file(self, key: str, path: Path) -> None:
        """Download a file, in parts if it is large."""
        with self._errors(key), local_errors(path), temporary_beside(path) as temporary:
            self._client.download_file(self._bucket, self._name(key), str(temporary))
            _sync(temporary)
            temporary.replace(path)

    def get_bytes(self, key: str) -> bytes:
        """Download in one request."""
        with self._errors(key):
            return self._client.get_object(Bucket=self._bucket, Key=self._name(key))["Body"].read()

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
                        yield StoredObject(key, entry["Size"], entry["LastModified"])

    def delete(self, key: str) -> None:
        """Delete; S3 does not mind a missing object."""
        with self._errors():
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

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
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError) as error:
            # upload_file hides the answer that it got behind an error of its own.
            cause = error.__context__ if isinstance(error, Boto3Error) else error
            if not isinstance(cause, ClientError):
                raise self._no_answer(error) from error
            if key is not None and _status(cause) == 404 and cause.response["Error"]["Code"] != "NoSuchBucket":
                raise _not_found(f"{self.uri}/{key}") from error
            raise self._refusal(cause) from error

    def _refusal(self, error: "ClientError") -> StoreUnavailableError:
        status, code = _status(error), error.response["Error"]["Code"]
        if code == "NoSuchBucket":
            problem, mend = "has no such bucket", "create it or correct DEME_STORE_URI"
        elif status in (401, 403):
            problem, mend = f"denies access ({code})", "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and their rights"
        else:
            problem, mend = f"answered {status} ({code})", "check the server and AWS_ENDPOINT_URL"
        return StoreUnavailableError(f"{self.place} {problem}; {mend}.")

    def _no_answer(self, error: Exception) -> StoreUnavailableError:
        kind = type(error).__name__
        if "Credential" in kind:
            mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            return StoreUnavailableError(f"Cannot use {self.place} ({kind}); {mend}.")
        mend = "check that it is up and that AWS_ENDPOINT_URL is its address"
        return _NoAnswerError(f"Cannot use {self.place} ({kind}); {mend}.")


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
    return S3Store(s3_uri[1], s3_uri[2], _s3_client())


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
        except _NoAnswerError:
            time.sleep(wait_sec)
    return _probe(store)


def _probe(store: ObjectStore) -> None:
    key, data = f".access-check/{uuid4().hex}", os.urandom(16)
    store.put_bytes(key, data)
    kept = store.exists(key) and store.get_bytes(key) == data
    store.delete(key)
    if not kept:
        raise StoreUnavailableError(f"{store.place} does not return what is written to it; correct DEME_STORE_URI.")


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


def local_errors(path: Path) -> AbstractContextManager[None]:
    """The same for a file of the local cache."""
    return system_errors(str(path), "point DEME_HOME elsewhere")


def _copy(source: BinaryIO, path: Path) -> None:
    with path.open("xb") as file:
        shutil.copyfileobj(source, file)
    _sync(path)


def _sync(path: Path) -> None:
    # Otherwise a power cut soon after the rename leaves a file with its name and without its bytes.
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _folder_of(uri: str) -> Path:
    path = unquote(uri.removeprefix("file://"))
    if not uri.startswith("file://") or not path.startswith("/"):
        raise InputError(_URI_RULE)
    return Path(path)


def _not_found(uri: str) -> ArtifactNotFoundError:
    return ArtifactNotFoundError(f"{uri} is not in the object store; run the stage that makes it again.")


def _status(error: "ClientError") -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _s3_client() -> "S3Client":
    from boto3.session import Session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(connect_timeout=5, read_timeout=60, retries={"mode": "standard", "total_max_attempts": 4})
    try:
        client = Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        # Without its cause, which quotes the endpoint: it may hold a password.
        raise StoreUnavailableError(
            f"The AWS_* variables make no S3 client ({type(error).__name__}); AWS_ENDPOINT_URL must be a URL such as "
            "http://127.0.0.1:8333, and AWS_PROFILE a profile that exists."
        ) from None
    if "@" in client.meta.endpoint_url:
        raise StoreUnavailableError("AWS_ENDPOINT_URL must hold no password; use AWS_SECRET_ACCESS_KEY.")
    return client
