"""Shards of a streamed data set on local disk: never more bytes than allowed; the least recently used leave first."""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from deme_core.digests import json_digest
from deme_core.downloads import NUM_DOWNLOADS
from deme_core.errors import DatasetError, ObjectTooLargeError
from deme_core.local_files import TEMPORARY_PREFIX, check_space, local_errors, temporary_beside
from deme_core.store import ObjectStore, StoredObject

_SHARD, _RESERVED = ".shard", ".reserved"
_WAIT_SEC = 0.2


class ShardCache:
    """Whole local copies of objects, for all processes of this machine that use the folder.

    Args:
        store: where the objects are.
        folder: where the copies are; it may be deleted at any time.
        max_bytes: bound of all of them together, those being downloaded included.
    """

    def __init__(self, store: ObjectStore, folder: Path, max_bytes: int) -> None:
        self._store, self._folder, self.max_bytes = store, folder, max_bytes

    def path(self, shard: StoredObject) -> Path:
        """Where the copy of this version of an object is, if there is one."""
        return self._folder / f"{json_digest([self._store.uri, *shard.identity])}{_SHARD}"

    def fetch(self, shards: Sequence[StoredObject]) -> None:
        """Bring objects here, several at once; another process may push them out again at any time.

        Raises:
            DatasetError: one is larger than the cache may be, or not of the size listed.
            StoreUnavailableError: the store cannot be reached, or the disk has no room.
        """
        missing = [shard for shard in shards if not self._touch(shard)]
        if missing:
            with ThreadPoolExecutor(NUM_DOWNLOADS) as executor:
                list(executor.map(self._download, missing))

    @contextmanager
    def reading(self, shard: StoredObject) -> Iterator[BinaryIO]:
        """Give the copy of an object, open, which no process pushes out meanwhile; errors as of `fetch`."""
        file: BinaryIO | None = None
        while file is None:
            self.fetch([shard])
            # Under the lock, or it could be pushed out between the two calls.
            with self._alone(), suppress(FileNotFoundError):
                file = self.path(shard).open("rb")
                fcntl.flock(file, fcntl.LOCK_SH)
        with file:
            yield file

    def discard(self, shard: StoredObject) -> None:
        """Remove the copy of an object, if there is one."""
        self.path(shard).unlink(missing_ok=True)

    def _touch(self, shard: StoredObject) -> bool:
        path = self.path(shard)
        try:
            os.utime(path)
            return path.stat().st_size == shard.size
        except FileNotFoundError:
            return False

    def _download(self, shard: StoredObject) -> None:
        with self._reserve(shard) as reservation:
            try:
                if not self._touch(shard):
                    self._get(shard, self.path(shard))
            finally:
                Path(reservation.name).unlink(missing_ok=True)

    def _get(self, shard: StoredObject, place: Path) -> None:
        with local_errors(place), temporary_beside(place) as arrived:
            for _ in range(2):  # It may have been cut on its way.
                with suppress(ObjectTooLargeError):
                    self._store.get_file(shard.key, arrived, max_bytes=shard.size)
                    if arrived.stat().st_size == shard.size:
                        arrived.replace(place)
                        return
        raise changed(f"{shard.key} at {self._store.uri}")

    def _reserve(self, shard: StoredObject) -> BinaryIO:
        """Returns a file that stands for bytes which are about to come, and takes none itself, for as long as open."""
        if shard.size > self.max_bytes:
            raise DatasetError(f"dataset.cache_gb is less than {shard.key} alone, {shard.size} bytes; raise it.")
        while True:
            with self._alone():
                if self._make_room(shard.size):
                    check_space(self._folder, shard.size)
                    reservation = self._folder / f"{uuid4().hex}-{self.path(shard).stem}{_RESERVED}"
                    with local_errors(reservation):
                        file = reservation.open("xb")
                        # The system unlocks it when this process dies; a process id soon is that of another one.
                        fcntl.flock(file, fcntl.LOCK_EX)
                        file.truncate(shard.size)
                    return file
            time.sleep(_WAIT_SEC)  # For a download of another process to end.

    def _make_room(self, num_bytes: int) -> bool:
        """Removes the least recently used copies until so many bytes more are allowed; whether that is enough."""
        kept, total = [], 0
        found = set(self._folder.iterdir())
        abandoned = {path for path in found if path.suffix == _RESERVED and _is_abandoned(path)}
        arriving = {path for path in found - abandoned if path.suffix == _RESERVED}
        if not arriving:  # Whose downloads have such names until they are whole.
            abandoned |= {path for path in found if path.name.startswith(TEMPORARY_PREFIX)}
        for path in abandoned:
            path.unlink(missing_ok=True)
        for path in arriving:
            if (shard := self._folder / f"{path.stem.partition('-')[2]}{_SHARD}") not in found:
                # Counted even if the shard arrives meanwhile, and the reservation leaves after it.
                total += _size(path) or _size(shard)
        for path in found:
            if path.suffix == _SHARD:
                with suppress(FileNotFoundError):
                    status = path.stat()
                    total += status.st_size
                    kept.append((status.st_mtime_ns, status.st_size, path))
        for _, size, path in sorted(kept):
            if total + num_bytes <= self.max_bytes:
                break
            if not _is_being_read(path):
                path.unlink(missing_ok=True)
                total -= size
        return total + num_bytes <= self.max_bytes

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with local_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = (self._folder / ".lock").open("w")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def changed(what: str) -> DatasetError:
    """Returns the error for what is not as it was listed or indexed."""
    return DatasetError(f"{what} changed; leave tars as they are while they are used, and run again.")


def _is_being_read(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # Any other: it is gone, or of another user.
        return isinstance(error, BlockingIOError)
    return False


def _is_abandoned(reservation: Path) -> bool:
    """Whether the process is dead that made a reservation, which is locked until it is removed."""
    try:
        with reservation.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return os.fstat(file.fileno()).st_nlink > 0  # It may have been removed meanwhile.
    except OSError:  # It is locked, or removed, or of another user.
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
