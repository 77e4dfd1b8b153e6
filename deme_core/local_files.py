"""Files on this machine's disks: written beside and renamed, synced, and their errors as one sentence."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from uuid import uuid4

from deme_core.errors import InputError, StoreUnavailableError, first_line

TEMPORARY_PREFIX = ".tmp-"


def user_path(name: str) -> Path:
    """Returns the path that a user gave, with ``~`` expanded; there may be nothing.

    Raises:
        InputError: the system looks for nothing of that name, as one of 300 characters.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise InputError(f"Cannot look for {name} ({reason}); give another path.") from error
    return path


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a new name in the folder of ``path``; whatever bears it in the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid4().hex}")
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


@contextmanager
def system_errors(place: str, remedy: str) -> Iterator[None]:
    """Turn the system's refusal into one sentence: where, why and what to do."""
    try:
        yield
    except OSError as error:
        first = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check its permissions"
        reason = error.strerror or type(error).__name__
        raise StoreUnavailableError(f"Cannot use {place} ({reason}); {first} or {remedy}.") from error


def check_space(folder: Path, num_bytes: int, *, variable: str = "DEME_HOME") -> None:
    """Raises StoreUnavailableError if the disk of a folder that exists has no room for so much.

    Args:
        folder: where it shall go.
        num_bytes: how much.
        variable: what moves the folder elsewhere.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise StoreUnavailableError(
            f"Cannot use {folder.parent} ({num_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free); free "
            f"space or point {variable} elsewhere."
        )


def local_errors(path: Path) -> AbstractContextManager[None]:
    """`system_errors` for a file of the local cache."""
    return system_errors(str(path), "point DEME_HOME elsewhere")


def sync(path: Path) -> None:
    """Waits until a file is on the disk: else a power cut after a rename leaves its name without its bytes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
