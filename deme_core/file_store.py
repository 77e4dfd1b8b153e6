"""The object store as a folder: every object is a file."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO
from urllib.parse import unquote

from deme_core.errors import ArtifactNotFoundError, InputError, ObjectTooLargeError
from deme_core.local_files import local_errors, sync, system_errors, temporary_beside
from deme_core.store import MAX_BYTES_AT_ONCE, URI_RULE, Digest, StoredObject, check_key, is_key, not_found, too_large

# Larger writes make the kernel look for huge pages, see deme_core.checkpoint.
_BYTES_PER_PIECE = 256 << 10


class FileStore:
    """Objects are files below a folder, which the first write makes; a link that leads out of it is none.

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
            if not _copy(source, temporary, digest, max_bytes=max_bytes):
                raise self._too_large(key, max_bytes)
            temporary.replace(path)

    def get_bytes(self, key: str) -> bytes:
        """Read a file."""
        with self._errors(key), self._open(key, MAX_BYTES_AT_ONCE) as file:
            data = bytearray()
            while piece := file.read(_BYTES_PER_PIECE):  # A read of so many bytes makes room for all of them first.
                data += piece
                if len(data) > MAX_BYTES_AT_ONCE:
                    raise self._too_large(key, MAX_BYTES_AT_ONCE)
        return bytes(data)

    def get_range(self, key: str, offset: int, size: int) -> bytes:
        """Read a part of a file."""
        with self._errors(key), self._open(key) as file:
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
                        modified = datetime.fromtimestamp(status.st_mtime, UTC)
                        # As stat_listing has it. No inode number: some network file systems give new ones when mounted.
                        version = f"{status.st_mtime_ns} {status.st_ctime_ns}"
                        yield StoredObject(key, status.st_size, modified, version)

    def delete(self, key: str) -> None:
        """Remove a file; its folder stays, for another writer may be about to use it."""
        with self._errors(), suppress(FileNotFoundError, NotADirectoryError):
            self._path(key).unlink()

    def delete_if(self, key: str, data: bytes) -> bool:
        """Remove a file that was just read; between the two is no time but that of a few system calls."""
        with suppress(ArtifactNotFoundError), self._errors(key):
            with self._open(key) as file:
                is_still_there = file.read(len(data) + 1) == data
            if is_still_there:
                self._path(key).unlink()
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
        path = self.folder / check_key(key)
        if self._is_outside(path.parent):
            # At the first look, not after the work whose result is to go there.
            raise InputError(f"{self.uri}/{key} lies outside of the store, where a link leads; put a folder there.")
        return path

    def _open(self, key: str, max_bytes: int | None = None) -> BinaryIO:
        """Opens a file of the folder; what is no plain file is not there, and a pipe is not waited for."""
        path = os.path.realpath(self._path(key), strict=True)
        if self._is_outside(path):
            raise ArtifactNotFoundError(
                f"{self.uri}/{key} is a link that leads out of the store; put there what it leads to."
            )
        with ExitStack() as stack:
            file = stack.enter_context(os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb"))
            status = os.fstat(file.fileno())
            if not S_ISREG(status.st_mode):
                raise not_found(f"{self.uri}/{key}")
            if max_bytes is not None and status.st_size > max_bytes:
                raise self._too_large(key, max_bytes)
            stack.pop_all()
        return file

    def _is_outside(self, path: str | Path) -> bool:
        """Whether links lead out of the folder, which may be a link itself."""
        return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder))

    def _too_large(self, key: str, max_bytes: int) -> ObjectTooLargeError:
        return too_large(f"{self.uri}/{key}", max_bytes)

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


def _copy(source: BinaryIO, path: Path, digest: Digest | None = None, *, max_bytes: int | None = None) -> bool:
    """Writes what a file holds to ``path``; False if it grew beyond so many bytes, when it stops."""
    with path.open("xb") as file:
        while piece := source.read(_BYTES_PER_PIECE):
            file.write(piece)
            if max_bytes is not None and file.tell() > max_bytes:
                return False
            if digest is not None:
                digest.update(piece)
    sync(path)
    return True


def _folder_of(uri: str) -> Path:
    path = unquote(uri.removeprefix("file://"))
    if not uri.startswith("file://") or not path.startswith("/") or "\0" in path:
        raise InputError(URI_RULE)
    return Path(path)
