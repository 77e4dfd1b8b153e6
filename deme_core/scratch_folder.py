"""Scratch folders: made for one use, removed after it, and known to be in use as long as their process lives."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from deme_core.local_files import local_errors

_LOCK = "in-use"


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Gives an empty folder below ``parent``, which is made if need be.

    Raises:
        StoreUnavailableError: the disk takes no folder.
    """
    with local_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(dir=parent)
    with folder as name:
        # A folder in it, since a temporary folder can be read by its owner alone, and this one may be kept.
        out, lock = Path(name, "out"), Path(name, _LOCK)
        with local_errors(parent):
            out.mkdir()
            lock.touch()
        with lock.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # The system unlocks it if this process is killed.
            yield out


def is_in_use(folder: Path) -> bool:
    """Whether a process uses a folder that `scratch_folder` made."""
    try:
        with (folder / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:  # Killed before it had one.
        return False
    except BlockingIOError:
        return True
    return False
