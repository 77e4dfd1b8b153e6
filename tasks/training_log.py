"""The training log: the progress of one training run on its way to MLflow, which may be away for a while."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from deme_core.errors import TrackingUnavailableError
from tasks.tracking import Tracker

_SECONDS_BETWEEN_RECORDS = 3.0
_SECONDS_TO_GIVE_UP = 10.0

Record = Mapping[str, Any]


class TrainingLog:
    """Passes records on to MLflow some seconds' worth at a time, in a thread of its own: no training waits for it.

    Args:
        start: starts the child run of the training, and returns its id with the tracker; called in that thread.
    """

    def __init__(self, start: Callable[[], tuple[Tracker, str]]) -> None:
        self._start = start
        self._run: tuple[Tracker, str] | None = None
        self._waiting: list[tuple[Record, int]] = []  # Each with the time at which it came, in ms since the epoch.
        self._seen: set[int] = set()
        self._change = threading.Condition()
        self._ending = False
        self._bad_end: Literal["FAILED", "KILLED"] | None = None
        self._error: Exception | None = None
        # A daemon, since nothing shall keep a process from ending that has lost its server.
        self._sender = threading.Thread(target=self._send, daemon=True)
        self._sender.start()

    def add(self, record: Record) -> None:
        """Takes a record, in the order of steps; returns at once.

        Raises:
            Exception: what MLflow refused the child run with. Better at the first records than after all the work.
        """
        if self._run is None and self._error is not None:
            raise self._error
        with self._change:
            self._take([record])

    def complete(self, history: Iterable[Record]) -> str:
        """Adds what was not seen of a history, as of a training that was resumed or served from the store; sends all.

        Returns:
            The id of the child run.

        Raises:
            TrackingUnavailableError: the server stayed away.
        """
        with self._change:
            self._take([record for record in history if record["global_step"] not in self._seen])
        self._end()
        self._sender.join()
        if self._error is not None:
            raise self._error
        assert self._run is not None
        return self._run[1]

    def abandon(self, status: Literal["FAILED", "KILLED"]) -> None:
        """Sends what was taken of a training that has not come to its end, and why, if that can be done in seconds."""
        self._bad_end = status
        self._end()
        self._sender.join(_SECONDS_TO_GIVE_UP)

    def _take(self, records: list[Record]) -> None:
        came = int(time.time() * 1000)
        self._waiting += [(record, came) for record in records]
        self._seen |= {record["global_step"] for record in records}

    def _end(self) -> None:
        with self._change:
            self._ending = True
            self._change.notify()

    def _send(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._ending, _SECONDS_BETWEEN_RECORDS)
                batch, is_last = list(self._waiting), self._ending
            try:
                self._run = self._run or self._start()
                tracker, run_id = self._run
                if batch:
                    tracker.log_training(run_id, batch)
                if is_last and self._bad_end:
                    tracker.finish(run_id, self._bad_end)
            except Exception as error:
                if isinstance(error, TrackingUnavailableError) and not is_last:
                    continue  # The same again, with the same times: what arrived of it is not there twice.
                self._error = error
                return
            with self._change:
                del self._waiting[: len(batch)]
                if is_last:
                    return
