"""The worker pool: supervised worker processes, one per GPU or a few on CPU.

A process serves one job at a time and many in turn, since importing torch takes seconds. When it dies, killed or
out of memory, only its job fails; the next job gets a fresh process.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable

from deme_core.errors import InputError, RunEndedError, WorkerDiedError
from deme_core.settings import Settings
from tasks.jobs import Job, JobResult
from tasks.progress import Report, waiting
from tasks.slots import Slot
from tasks.worker_process import WorkerProcess

# A worker is waited for a little longer than it gives itself for its checkpoint.
_SECONDS_AFTER_CHECKPOINT = 2.0
_SECONDS_BETWEEN_LOOKS = 0.5
_PATIENCE_SECONDS = 15.0


class WorkerPool:
    """Runs jobs in worker processes; safe to use from many threads.

    Jobs begin in the order in which they come, those that others wait for first. While a job has a GPU no other process
    of this machine's pools does.

    Args:
        slots: where processes may run.
        log: takes what the processes write to stderr, line by line, and what is waited for; may be replaced at any
            time.

    Raises:
        InputError: the environment says no number of seconds for checkpoints.
    """

    def __init__(self, slots: list[Slot], log: Callable[[str], None] = lambda _: None) -> None:
        self.log = log
        self._closed = self._starts_ahead = False
        self._seconds_to_stop = Settings().stop_seconds + _SECONDS_AFTER_CHECKPOINT
        self._workers = [WorkerProcess(slot, lambda line: self.log(line), self._seconds_to_stop) for slot in slots]
        self._free = list(self._workers)  # The one that was used last is last: it has models in its memory.
        self._waiting: set[tuple[int, int]] = set()
        self._num_came = itertools.count()
        self._changed = threading.Condition()

    def start(self) -> None:
        """Starts the process of the first job, so that its imports overlap with what the caller does next.

        Others of its kind start beside that job: before it, they would compete with its process and the caller for the
        cores.
        """
        self._starts_ahead = True
        self._suitable(1)[-1].start()

    def run(self, job: Job, report: Report, *, on_start: Callable[[], None] = lambda: None) -> JobResult:
        """Does ``job`` in the next free process and returns its result.

        Args:
            job: what to do.
            report: called with every progress record, in the caller's thread.
            on_start: called when a process is free and the job begins.

        Raises:
            DemeError: the job failed; of the class it failed with, where DeMe foresaw it.
            WorkerDiedError: the process ended before the job did.
        """
        told: list[str] = []

        def say(what: str) -> None:
            told.append(what)
            self.log(f"{job.display_name} waits for {what}")
            report(waiting(what))

        worker, idle = self._take(job, say)
        try:
            if told:
                report({"message": f"on GPU {worker.gpu}"})
            for other in idle:
                other.close(time.monotonic())
            if self._starts_ahead:
                self._starts_ahead = False
                for other in self._workers:
                    if other.num_gpus == worker.num_gpus:
                        other.start()
            on_start()
            return worker.run(job, report)
        except WorkerDiedError as error:
            if self._closed:  # It did not die, it was dismissed: nobody shall try again.
                raise RunEndedError from error
            raise
        finally:
            with self._changed:
                worker.gpu_lock.release()
                self._free.append(worker)
                self._changed.notify_all()

    def _take(self, job: Job, say: Callable[[str], None]) -> tuple[WorkerProcess, list[WorkerProcess]]:
        """Waits for its turn and a process whose GPUs are free, and takes both away from others.

        Returns:
            It, and idle ones that keep memory on its GPUs, which nobody else can take now.
        """
        suitable = self._suitable(job.num_processes)
        ticket = (int(job.can_wait), next(self._num_came))
        with self._changed:
            self._waiting.add(ticket)
        patience = time.monotonic() + _PATIENCE_SECONDS
        try:
            while (taken := self._first_free(suitable, ticket, patience)) is None:
                gpus = " or ".join(str(worker.gpu) for worker in suitable)
                say(f"GPU {gpus}, in use by other runs of this machine")
                patience = math.inf
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        return taken

    def _first_free(
        self, suitable: list[WorkerProcess], ticket: tuple[int, int], patience: float
    ) -> tuple[WorkerProcess, list[WorkerProcess]] | None:
        """Returns what ``_take`` does, or None where other programs alone keep it back at ``patience`` (monotonic)."""
        with self._changed:
            while not self._closed:
                is_next = min(self._waiting) == ticket
                for worker in reversed(self._free) if is_next else ():
                    if worker in suitable and worker.gpu_lock.try_acquire():
                        self._free.remove(worker)
                        return worker, [other for other in self._free if other.shares_gpus(worker)]
                if is_next and time.monotonic() > patience and self._is_kept_back(suitable):
                    return None
                # Other programs give GPUs back without a word.
                self._changed.wait(_SECONDS_BETWEEN_LOOKS if is_next else None)
        raise RunEndedError

    def _is_kept_back(self, suitable: list[WorkerProcess]) -> bool:
        """Whether a process is free whose GPUs no other of this pool has: then other programs have them."""
        busy = [worker for worker in self._workers if worker not in self._free]
        return any(not any(worker.shares_gpus(other) for other in busy) for worker in suitable if worker in self._free)

    def _suitable(self, num_processes: int) -> list[WorkerProcess]:
        """Returns the workers with as many GPUs as a job needs; all of them on CPU.

        Raises:
            InputError: there are none.
        """
        sizes = [worker.num_gpus for worker in self._workers if worker.num_gpus in (0, num_processes)]
        if not sizes:
            raise InputError(f"num_processes is {num_processes}, but no worker here has so many GPUs; lower it.")
        return [worker for worker in self._workers if worker.num_gpus == sizes[0]]

    def close(self) -> None:
        """Ends every process and starts no more; a training that is under way leaves a checkpoint first."""
        self._closed = True
        with self._changed:
            self._changed.notify_all()
        for worker in self._workers:  # All at once: together they have the time that one has.
            worker.stop()
        deadline = time.monotonic() + self._seconds_to_stop
        for worker in self._workers:
            worker.close(deadline)
