"""Image files in an object store, brought into the local cache."""

import fcntl
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from deme_core.digests import canonical_json, sha256_bytes
from deme_core.errors import DatasetError, InputError, StoreUnavailableError
from deme_core.images.source import is_image_name
from deme_core.store import ObjectStore, StoredObject, local_errors, open_store

NUM_DOWNLOADS = 8


def fetch_images(uri: str, cache: Path) -> Path:
    """Download the images below an object-store prefix, or one zip.

    What an earlier call has already brought is kept, whole files only, also when that call was killed.

    Args:
        uri: ``s3://bucket/prefix`` or ``s3://bucket/name.zip``.
        cache: where downloads are kept, each version of the prefix in a folder of its own.

    Returns:
        The local folder, or the local zip.

    Raises:
        DatasetError: there is no image, or no such kind of URI.
        StoreUnavailableError: the store cannot be reached.
    """
    is_zip = uri.lower().endswith(".zip")
    parent, _, name = uri.rpartition("/") if is_zip else (uri, "", "")
    store = _open(parent)
    objects = [o for o in store.list(name) if (o.key == name if is_zip else is_image_name(o.key))]
    if not objects:
        raise DatasetError(f"There is no {'such zip' if is_zip else 'image'} at {uri}; check dataset.path.")
    folder = cache / "downloads" / _version(uri, objects)
    with _only_one_process(folder):
        _download(store, objects, folder)
    return folder / name


def _version(uri: str, objects: Sequence[StoredObject]) -> str:
    rows = sorted((o.key, o.size, o.modified.isoformat()) for o in objects)
    return sha256_bytes(canonical_json([uri, rows]).encode())


def _download(store: ObjectStore, objects: Sequence[StoredObject], folder: Path) -> None:
    def get(item: StoredObject) -> None:
        path = folder / item.key
        if not path.exists() or path.stat().st_size != item.size:
            store.get_file(item.key, path)

    with ThreadPoolExecutor(NUM_DOWNLOADS) as executor:
        futures = [executor.submit(get, item) for item in objects]
        try:
            for future in futures:
                future.result()
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def _open(uri: str) -> ObjectStore:
    try:
        return open_store(uri)
    except StoreUnavailableError:
        raise
    except InputError as error:
        raise DatasetError("dataset.path is no object-store URI; give s3://BUCKET/PREFIX.") from error


@contextmanager
def _only_one_process(folder: Path) -> Iterator[None]:
    """Let the segments of one machine download a data set once: the others wait and then find it."""
    with local_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with local_errors(folder), (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
