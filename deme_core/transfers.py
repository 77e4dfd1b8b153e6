"""Files on their way between a folder and the object store, several at once, hashed meanwhile."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from deme_core.digests import sha256_file
from deme_core.errors import ArtifactNotFoundError, ChecksumMismatchError, DemeError, ObjectTooLargeError
from deme_core.manifest import StoredFile
from deme_core.store import ObjectStore, check_key

# Files that travel, or are hashed, side by side (benchmarks/store.py).
_FILES_AT_ONCE = 4
T = TypeVar("T")
R = TypeVar("R")


def upload_folder(store: ObjectStore, folder: Path, prefix: str) -> tuple[StoredFile, ...]:
    """Store all files of a folder under ``prefix``; after a failure nothing of it stays, as far as the store lets."""
    names = _names(folder)
    work: list[Callable[[], Any]] = []
    for name in names:
        path = folder / name
        work += [partial(store.put_file, f"{prefix}/{name}", path), partial(sha256_file, path)]
    try:
        digests = side_by_side(lambda act: act(), work)[1::2]
    except BaseException:
        # Above all on a full disk; if it fails too, sweep will do it.
        with suppress(DemeError):
            for name in names:
                store.delete(f"{prefix}/{name}")
        raise
    return tuple(
        StoredFile(name, f"{prefix}/{name}", (folder / name).stat().st_size, sha256)
        for name, sha256 in zip(names, digests, strict=True)
    )


def download_file(store: ObjectStore, file: StoredFile, path: Path) -> str | None:
    """Download a file of an artifact to ``path``; returns what is wrong with the stored one, None for a sound one.

    Raises:
        ChecksumMismatchError: it arrives otherwise each time, so that the way is what does damage.
    """
    first = _receive(store, file, path)
    if first is None:
        return None
    # Once more: the way from the store may be what does damage or loses it, and nothing is thrown away for that.
    second = _receive(store, file, path)
    if second is not None and second != first:
        raise ChecksumMismatchError(
            f"{store.uri}/{file.key} arrives with other bytes each time it is read; check the network and this machine."
        )
    return second


def side_by_side(act: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return what ``act`` returned for each item; after a failure nothing more begins and all that began has ended."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        futures = [threads.submit(act, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def _receive(store: ObjectStore, file: StoredFile, path: Path) -> str | None:
    """Downloads a file; returns what is wrong with it."""
    uri = f"{store.uri}/{file.key}"
    promised = f"but its manifest promises {file.size} bytes with {file.sha256}"
    digest = hashlib.sha256()
    try:
        store.get_file(file.key, path, digest, max_bytes=file.size)
    except ArtifactNotFoundError:
        return f"{uri} is lost"
    except ChecksumMismatchError as error:
        return str(error).rstrip(".")
    except ObjectTooLargeError:
        return f"{uri} holds more than {file.size} bytes, {promised}"
    size, sha256 = path.stat().st_size, digest.hexdigest()
    if (size, sha256) == (file.size, file.sha256):
        return None
    return f"{uri} holds {size} bytes with SHA-256 {sha256}, {promised}"


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder to publish.")
    return sorted(check_key(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
