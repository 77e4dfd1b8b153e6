"""Live flow runs: a locked file for each on its machine, so that the next run can tell MLflow which were killed.

Nobody else can: a killed process says nothing, and MLflow shows its runs as running for ever.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deme_core.digests import sha256_bytes
from deme_core.local_files import local_errors
from deme_core.settings import Settings

_UNNAMED = ".new"


@contextmanager
def live_run(settings: Settings, flow_run_id: str) -> Iterator[None]:
    """Holds the lock of a flow run until it has ended and has told MLflow so.

    Raises:
        StoreUnavailableError: the disk takes no file.
    """
    path = _folder(settings) / flow_run_id
    # Locked before it has its name, and removed as long as it is locked: whoever sees it unlocked sees a killed run.
    unnamed = path.with_suffix(_UNNAMED)
    with local_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        unnamed.write_text(_tracking(settings))
        file = unnamed.open("rb")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        unnamed.rename(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def killed_runs(settings: Settings) -> Iterator[str]:
    """Yields the ids of flow runs of this machine that were killed, and forgets each when the next one is asked for.

    Runs that were tracked elsewhere are kept for whoever tracks there.
    """
    for path in [path for path in _folder(settings).glob("*") if path.suffix != _UNNAMED]:
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if file.read().decode() == _tracking(settings):
                    yield path.name
                    path.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError):  # It lives, or has just ended.
            continue


def _folder(settings: Settings) -> Path:
    return settings.state_folder / "live-runs"


def _tracking(settings: Settings) -> str:
    """A digest, since the address of a database may hold a password."""
    return sha256_bytes(settings.tracking_uri.encode())
