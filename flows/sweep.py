"""``deme sweep``: frees what killed processes left behind, in the object store and on this machine."""

import re
import shutil
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from deme_core.artifacts import ArtifactStore
from deme_core.file_store import FileStore
from deme_core.local_files import local_errors, temporary_beside
from deme_core.scratch_folder import is_in_use
from deme_core.settings import Settings
from deme_core.store import ObjectStore, open_store, store_time
from tasks.jobs import CHECKPOINTS
from tasks.remote_sender import JOBS_PREFIX

# Of the cache: data sets in places of their own, and what has a bound of its own or would be fetched from other sites.
_DOWNLOADS, _SPARED = Path("images", "downloads"), ("images", "extractors")
_CHECKPOINT = re.compile(rf"({CHECKPOINTS}/[^/]+)/[^/]+/manifest\.json")


def sweep(older_than: timedelta) -> tuple[int, int]:
    """Deletes objects that no manifest names, outcomes that no run collected, and scratch folders that nobody uses.

    Args:
        older_than: spare anything younger; must exceed the longest upload.

    Returns:
        Number of objects, and of scratch folders.
    """
    settings = Settings()
    store = open_store(settings.store_uri)
    num_objects = ArtifactStore(store, settings.cache_folder).sweep(older_than) + _sweep_outcomes(store, older_than)
    scratch = settings.state_folder / "scratch"
    if not scratch.is_dir():
        return num_objects, 0
    # By the clock that dates files, as in the store.
    before = store_time(FileStore(settings.cache_folder)) - older_than
    return num_objects, _sweep_scratch(scratch, before.timestamp())


def sweep_checkpoints(idle_for: timedelta) -> int:
    """Deletes the checkpoints of trainings that made none for so long; whoever runs them again begins anew.

    Returns:
        Number of trainings.
    """
    settings = Settings()
    store = open_store(settings.store_uri)
    artifacts, before = ArtifactStore(store, settings.cache_folder), store_time(store) - idle_for
    newest: dict[str, datetime] = {}
    for found in store.list(f"{CHECKPOINTS}/"):
        if match := _CHECKPOINT.fullmatch(found.key):
            newest[match[1]] = max(found.modified, newest.get(match[1], found.modified))
    abandoned = [stage for stage, modified in newest.items() if modified < before]
    for stage in abandoned:
        for ref in artifacts.list_refs(stage):
            artifacts.remove(ref)
    return len(abandoned)


def sweep_cache(unused_for: timedelta) -> int:
    """Deletes copies of artifacts, data sets and models in this machine's cache that nobody asked for since so long.

    Whatever is deleted is fetched again when it is asked for. A run asks at its beginning alone: give more than the
    longest takes.

    Returns:
        Number of bytes.
    """
    cache = Settings().cache_folder
    kinds = [cache / _DOWNLOADS, *(kind for kind in _folders(cache) if kind.name not in _SPARED)]
    before = (store_time(FileStore(cache)) - unused_for).timestamp()
    num_bytes = 0
    with local_errors(cache):
        for copy in [copy for kind in kinds for copy in _folders(kind)]:
            with suppress(FileNotFoundError):
                if _last_change(copy) < before:
                    num_bytes += sum(path.stat().st_size for path in copy.rglob("*") if path.is_file())
                    # Renamed first: if this is interrupted, no part may stay that a later fetch would trust.
                    with temporary_beside(copy) as doomed:
                        copy.rename(doomed)
    return num_bytes


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _sweep_scratch(scratch: Path, before: float) -> int:
    num_folders = 0
    with local_errors(scratch):
        for folder in scratch.iterdir():
            # Those who use a folder, and other sweeps, may remove anything in it between a look and the next.
            with suppress(FileNotFoundError):
                if folder.is_dir() and not is_in_use(folder) and _last_change(folder) < before:
                    shutil.rmtree(folder)
                    num_folders += 1
    return num_folders


def _last_change(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _sweep_outcomes(store: ObjectStore, older_than: timedelta) -> int:
    """Deletes outcomes and signatures of remote jobs whose run was killed."""
    before = store_time(store) - older_than
    stale = [found.key for found in store.list(JOBS_PREFIX) if found.modified < before]
    for key in stale:
        store.delete(key)
    return len(stale)
