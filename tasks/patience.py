"""Patience with an object store that is away: what a job made is not thrown away for that."""

import time
from collections.abc import Callable
from typing import TypeVar

from deme_core.errors import NoAnswerError

T = TypeVar("T")

_WAITS_SEC = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0)


def patiently(act: Callable[[], T]) -> T:
    """Returns what ``act`` returns; while the store gives no answer it is repeated, for two minutes."""
    for wait_sec in _WAITS_SEC:
        try:
            return act()
        except NoAnswerError:
            time.sleep(wait_sec)
    return act()
