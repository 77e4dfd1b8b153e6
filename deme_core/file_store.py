"""The object store as a folder: every object is a file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO
from urllib.parse import unquote

from deme_core.errors import ArtifactNotFoundError, InputError
from deme_core.local_files import local_errors, sync, system_errors, temporary_beside
from deme_core.store import MAX_BYTES_AT_ONCE, URI_RULE, Digest, StoredObject, check_key, is_key, not_found, too_large

# Larger writes make the kernel look for huge pages, see deme_core.checkpoint.
_BYTES_PER_PIECE = 256 << 10


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


def _copy(source: BinaryIO, path: Path, digest: Digest | None = None) -> None:
    with path.open("xb") as file:
        while piece := source.read(_BYTES_PER_PIECE):
            file.write(piece)
            if digest is not None:
                digest.update(piece)
    sync(path)


def _folder_of(uri: str) -> Path:
    path = unquote(uri.removeprefix("file://"))
    if not uri.startswith("file://") or not path.startswith("/"):
        raise InputError(URI_RULE)
    return Path(path)
