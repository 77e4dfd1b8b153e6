"""Peak memory of a process, by sampling what Linux tells of it."""

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

_SAMPLE_EVERY_SEC = 0.002
_SAMPLE_OTHERS_EVERY_SEC = 0.02


def anonymous_bytes(process: int | Literal["self"] = "self") -> int:
    """Returns RssAnon of a process: memory that is not backed by a file, so no page cache."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no RssAnon; this benchmark needs Linux.")


class PeakAnonymousMemory:
    """Samples `anonymous_bytes` in a thread while the context lasts; ``peak_bytes`` is the largest."""

    def __init__(self) -> None:
        self.peak_bytes = anonymous_bytes()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while True:
            left = self._left.wait(_SAMPLE_EVERY_SEC)
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
            if left:
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()


def run_measured(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, int, str]:
    """Runs a command to its end; returns its seconds, the peak of its anonymous memory in bytes, and what it printed.

    Raises:
        CalledProcessError: it failed.
    """
    started = time.perf_counter()
    with subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            try:
                peak = max(peak, anonymous_bytes(process.pid))
            except OSError:  # It has just ended.
                break
            time.sleep(_SAMPLE_OTHERS_EVERY_SEC)
        printed = process.communicate()[0]
    seconds = time.perf_counter() - started
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, peak, printed
