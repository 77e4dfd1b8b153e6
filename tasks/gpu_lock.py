"""What keeps two programs of one machine off a GPU: lock files that the system frees when their process dies."""

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout


class GpuLock:
    """Holds all of some GPUs or none; of none it always succeeds.

    Args:
        gpus: their names or numbers, as CUDA_VISIBLE_DEVICES has them.
    """

    def __init__(self, gpus: Iterable[str]) -> None:
        folder = Path(tempfile.gettempdir())
        names = [re.sub(r"[^A-Za-z0-9]+", "-", gpu) for gpu in sorted(gpus)]
        self._files = [FileLock(folder / f"deme-{os.getuid()}-gpu-{name}.lock", thread_local=False) for name in names]

    def try_acquire(self) -> bool:
        """Takes the GPUs if nobody has any of them; does not wait."""
        for file in self._files:
            try:
                file.acquire(timeout=0)
            except Timeout:
                self.release()
                return False
        return True

    def release(self) -> None:
        """Gives back what it holds."""
        for file in self._files:
            file.release()
