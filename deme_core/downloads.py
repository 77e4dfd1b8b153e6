"""Many objects of a store, brought into the local cache together."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from deme_core.digests import json_digest
from deme_core.errors import StoreUnavailableError
from deme_core.local_files import check_space, local_errors
from deme_core.store import ObjectStore, StoredObject

NUM_DOWNLOADS = 8


def listing_version(uri: str, objects: Sequence[StoredObject]) -> str:
    """Returns a digest that changes when anything under ``uri`` does."""
    return json_digest([uri, sorted(o.identity for o in objects)])


def download_once(store: ObjectStore, objects: Sequence[StoredObject], folder: Path) -> Path:
    """Downloads objects into ``folder``, one process of this machine at a time; returns the folder.

    What an earlier call has already brought is kept, whole files only, also when that call was killed.

    Raises:
        StoreUnavailableError: the store cannot be reached, the disk has no room, or an object is smaller than listed.
        ObjectTooLargeError: an object is larger than listed.
    """
    with _only_one_process(folder):
        _download(store, objects, folder)
    return folder


def _download(store: ObjectStore, objects: Sequence[StoredObject], folder: Path) -> None:
    def get(item: StoredObject) -> None:
        path = folder / item.key
        store.get_file(item.key, path, max_bytes=item.size)
        if not _is_there(path, item.size):
            path.unlink()
            raise StoreUnavailableError(
                f"{store.uri}/{item.key} is smaller than the {item.size} bytes that were listed; run again, and leave "
                "it as it is."
            )

    missing = [item for item in objects if not _is_there(folder / item.key, item.size)]
    check_space(folder, sum(item.size for item in missing))
    with ThreadPoolExecutor(NUM_DOWNLOADS) as executor:
        futures = [executor.submit(get, item) for item in missing]
        try:
            for future in futures:
                future.result()
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def _is_there(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


@contextmanager
def _only_one_process(folder: Path) -> Iterator[None]:
    """Let the segments of one machine download a data set once: the others wait and then find it."""
    with local_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with local_errors(folder), (folder / ".lock").open("w") as file:
        os.utime(file.fileno())  # The last use, for whoever sweeps the cache.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
