"""Progress: what tasks tell whoever watches, in this process, while they run."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

# What a job says of its progress, as JSON: the numbers of a training step, or a ``message``.
Record = dict[str, Any]
Report = Callable[[Record], None]
R = TypeVar("R")


def waiting(what: str) -> Record:
    """Returns the record of a job that waits for ``what``: also told where no bar shows it, since it may take long."""
    return {"message": f"waits for {what}", "is_waiting": True}


@dataclass(frozen=True)
class Event:
    """Something a task tells.

    Attributes:
        task: name of the task, e.g. ``finetune segment 2 [500, 750)``.
        kind: started, progress, warning, finished, cached, failed, or stopped, as the run was.
        record: the progress record, for kind progress; for a warning its ``message``, a sentence.
    """

    task: str
    kind: Literal["started", "progress", "warning", "finished", "cached", "failed", "stopped"]
    record: dict[str, Any] = field(default_factory=dict)


class Listener(Protocol):
    """Whoever watches; called from many threads."""

    def __call__(self, event: Event) -> None:
        """Takes an event."""


_listeners: list[Listener] = []


def subscribe(listener: Listener) -> Callable[[], None]:
    """Lets ``listener`` hear every event in this process; returns what ends that."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def tell(event: Event) -> None:
    """Passes ``event`` to every listener."""
    for listener in tuple(_listeners):
        listener(event)


def exhaust(work: Generator[Record, None, R], report: Report) -> R:
    """Does work that yields progress records, passing them to ``report``, and returns what it returns."""
    while True:
        try:
            record = next(work)
        except StopIteration as finished:
            return finished.value
        report(record)
