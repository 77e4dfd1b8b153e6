"""What keeps two programs of one machine off a GPU: lock files that the system frees when their process dies."""

import fcntl
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from deme_core.errors import InputError
from tasks.slots import card_names

# One for all users of the machine, whatever their TMPDIR is.
FOLDER = Path("/tmp")


class GpuLock:
    """Holds all of some GPUs or none; of none it always succeeds.

    Args:
        gpus: their names or numbers, as CUDA_VISIBLE_DEVICES has them.
    """

    def __init__(self, gpus: Iterable[str]) -> None:
        self._gpus = list(gpus)
        self._held: list[int] = []

    @functools.cached_property
    def _paths(self) -> list[Path]:
        # Found when they are first needed: nvidia-smi takes a second, in which a worker process is starting.
        names = sorted({re.sub(r"[^A-Za-z0-9]+", "-", name) for name in card_names(self._gpus)})
        return [FOLDER / f"deme-gpu-{name}.lock" for name in names]

    def try_acquire(self) -> bool:
        """Takes the GPUs if nobody has any of them; does not wait.

        Raises:
            InputError: there is something else in place of a lock file.
        """
        for path in self._paths:
            try:
                file = _open(path)
            except OSError as error:
                self.release()
                raise InputError(f"The GPU's lock {path} cannot be opened ({error.strerror}); remove it.") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                self.release()
                return False
            self._held.append(file)
        return True

    def release(self) -> None:
        """Gives back what it holds."""
        while self._held:
            os.close(self._held.pop())


def _open(path: Path) -> int:
    """Opens a lock file to read, which is all that a lock takes: it may be another user's, who made it first.

    Anyone may put anything there: a link is not followed, and a pipe not waited for.
    """
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            # Of two that make it one fails, and finds it.
            try:
                file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                continue
            os.fchmod(file, 0o644)  # Whatever the umask.
            return file
