"""``deme sweep``: frees what killed processes left behind, in the object store and on this machine."""

import shutil
from datetime import timedelta

from deme_core.artifacts import ArtifactStore
from deme_core.file_store import FileStore
from deme_core.local_files import local_errors
from deme_core.settings import Settings
from deme_core.store import ObjectStore, open_store, store_time
from tasks.remote_sender import is_outcome


def sweep(older_than: timedelta) -> tuple[int, int]:
    """Deletes objects that no manifest names, outcomes that no run collected, and scratch folders that nobody uses.

    Args:
        older_than: spare anything younger; must exceed the longest upload and the longest job without a checkpoint.

    Returns:
        Number of objects, and of scratch folders.
    """
    settings = Settings()
    store = open_store(settings.store_uri)
    num_objects = ArtifactStore(store, settings.cache_folder).sweep(older_than) + _sweep_outcomes(store, older_than)
    scratch, num_folders = settings.state_folder / "scratch", 0
    if not scratch.is_dir():
        return num_objects, 0
    with local_errors(scratch):
        # By the clock that dates files, as in the store.
        now = store_time(FileStore(settings.cache_folder)).timestamp()
        for folder in (path for path in scratch.iterdir() if path.is_dir()):
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            if newest < now - older_than.total_seconds():
                shutil.rmtree(folder)
                num_folders += 1
    return num_objects, num_folders


def _sweep_outcomes(store: ObjectStore, older_than: timedelta) -> int:
    """Deletes outcomes of remote jobs whose run was killed: one that lives collects them within seconds."""
    before = store_time(store) - older_than
    stale = [found.key for found in store.list("jobs/") if is_outcome(found.key) and found.modified < before]
    for key in stale:
        store.delete(key)
    return len(stale)
