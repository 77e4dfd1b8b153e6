"""A process of its own for what would hang if it failed, or forks: it has no threads of other tests."""

import multiprocessing
from collections.abc import Callable


def succeeds(act: Callable[[], object], *, seconds: float) -> bool:
    """Calls ``act``, which can be pickled, in a new process; whether it returned in time."""
    process = multiprocessing.get_context("spawn").Process(target=act)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == 0
