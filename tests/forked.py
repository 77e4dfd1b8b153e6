"""A forked process for what would hang if it failed: neither threads nor a DataLoader end when a test's time is up."""

import multiprocessing
from collections.abc import Callable


def succeeds(act: Callable[[], object], *, seconds: float) -> bool:
    """Calls ``act`` in a forked process; whether it returned in time."""
    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == 0
