"""The worker pool: supervised worker processes, one per GPU or a few on CPU.

A process serves one job at a time and many in turn, since importing torch takes seconds. When it dies, killed or
out of memory, only its job fails; the next job gets a fresh process.
"""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from deme_core.errors import InputError, RunEndedError, WorkerDiedError, WorkerStoppedError
from deme_core.settings import Settings
from tasks.error_messages import job_error
from tasks.gpu_lock import GpuLock
from tasks.jobs import Job, JobResult
from tasks.slots import Slot

_SECONDS_TO_LEAVE = 10.0
# A worker is waited for a little longer than it gives itself for its checkpoint.
_SECONDS_AFTER_CHECKPOINT = 2.0
_SECONDS_BETWEEN_LOOKS = 0.5
_PATIENCE_SECONDS = 15.0
# By these accelerate and torch take a process for one of many that srun, mpirun, torchrun or `accelerate launch` began,
# and wait for the others or train otherwise. Those of our own trainings are set in the worker, when they begin.
_OF_LAUNCHERS = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NODE_RANK|MASTER_(ADDR|PORT)|FORK_LAUNCHED"
    r"|(ACCELERATE|TORCHELASTIC|PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_.*|MPI_LOCAL.*)"
)

Report = Callable[[dict[str, Any]], None]


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
        self._workers = [_Worker(slot, lambda line: self.log(line)) for slot in slots]
        self._free = list(self._workers)  # The one that was used last is last: it has models in its memory.
        self._waiting: set[tuple[int, int]] = set()
        self._num_came = itertools.count()
        self._changed = threading.Condition()
        self._seconds_to_stop = _seconds_to_stop()

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

        def say(message: str) -> None:
            told.append(message)
            self.log(f"{getattr(job, 'label', job.stage)} {message}")
            report({"message": message})

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

    def _take(self, job: Job, say: Callable[[str], None]) -> tuple["_Worker", list["_Worker"]]:
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
                say(f"waits for GPU {gpus}, in use by other runs of this machine")
                patience = math.inf
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        return taken

    def _first_free(
        self, suitable: list["_Worker"], ticket: tuple[int, int], patience: float
    ) -> tuple["_Worker", list["_Worker"]] | None:
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

    def _is_kept_back(self, suitable: list["_Worker"]) -> bool:
        """Whether a process is free whose GPUs no other of this pool has: then other programs have them."""
        busy = [worker for worker in self._workers if worker not in self._free]
        return any(not any(worker.shares_gpus(other) for other in busy) for worker in suitable if worker in self._free)

    def _suitable(self, num_processes: int) -> list["_Worker"]:
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


class _Worker:
    """One process and the pipes to it."""

    def __init__(self, slot: Slot, log: Callable[[str], None]) -> None:
        self._slot, self._log = slot, log
        self._gpus = set(slot.gpu.split(",")) if slot.gpu is not None else set()
        self.gpu_lock = GpuLock(self._gpus)
        self._process: subprocess.Popen[str] | None = None
        self._is_busy = self._is_dismissed = False
        self._lock = threading.Lock()
        self._seconds_to_stop = _seconds_to_stop()

    @property
    def gpu(self) -> str | None:
        """As its slot has it."""
        return self._slot.gpu

    @property
    def num_gpus(self) -> int:
        """0 on CPU."""
        return len(self._gpus)

    def shares_gpus(self, other: "_Worker") -> bool:
        return not self._gpus.isdisjoint(other._gpus)

    def start(self) -> None:
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._is_dismissed:  # Nobody would end what started now.
            raise RunEndedError
        if self._process is not None and self._process.poll() is None:
            return
        # Else Python would import what lies in the folder where `deme` was called, in this process and its children.
        environment = {name: value for name, value in os.environ.items() if not _OF_LAUNCHERS.fullmatch(name)}
        environment |= {"OMP_NUM_THREADS": str(self._slot.num_threads), "PYTHONSAFEPATH": "1"}
        # Threads that spin while they wait slow a busy machine down many times over.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        environment.pop("MLFLOW_RUN_ID", None)
        if self._slot.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._slot.gpu
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tasks.worker", "--device", self._slot.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        threading.Thread(target=self._forward, args=(self._process,), daemon=True).start()

    def run(self, job: Job, report: Report) -> JobResult:
        with self._lock:
            self._start()
            self._is_busy, answered = True, False
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        request = {
            "job": type(job).__name__,
            "content": job.model_dump(mode="json"),
            "num_threads": self._slot.num_threads,
        }
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if not line.endswith("\n"):  # It died in the middle of a word.
                    break
                message = json.loads(line)
                if "record" in message:
                    report(message["record"])
                else:
                    answered = True
                    return self._outcome(message)
        except BrokenPipeError:
            pass  # The process died between two jobs; its exit status tells how.
        except Exception:
            if not answered:
                self._wait(0.0)  # What it would still say is about this job; the next one gets a fresh process.
            raise
        except BaseException:  # SIGTERM or Ctrl-C, if this is the main thread.
            self._process.terminate()
            threading.Thread(target=deque, args=(self._process.stdout, 0), daemon=True).start()
            self._wait(self._seconds_to_stop)
            raise
        finally:
            self._is_busy = False
        raise WorkerDiedError(
            f"The worker process of {getattr(job, 'label', job.stage)} {_ending(self._process.wait())} before its job "
            "was done; run again to go on from the last checkpoint."
        )

    def _outcome(self, message: dict[str, Any]) -> JobResult:
        if "result" in message:
            return JobResult.from_dict(message["result"])
        self._log(message["traceback"])
        error = job_error(message)
        if message.get("leaves") or isinstance(error, WorkerStoppedError):
            self._wait(_SECONDS_TO_LEAVE)
        raise error

    def stop(self) -> None:
        """Asks a process in the middle of its job to leave, and starts no other."""
        with self._lock:
            self._is_dismissed = True
            if self._process is not None and self._is_busy:
                self._process.terminate()

    def close(self, deadline: float) -> None:
        """Ends the process, by force at ``deadline`` (monotonic seconds)."""
        if self._process is None or self._process.poll() is not None:
            return
        assert self._process.stdin is not None
        if self._is_busy:
            self._wait(deadline - time.monotonic())
        self._process.stdin.close()
        self._wait(_SECONDS_TO_LEAVE)

    def _wait(self, seconds: float) -> None:
        """Waits for the end of the process, and brings it about in the end."""
        assert self._process is not None
        try:
            self._process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _forward(self, process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self._log(line.rstrip("\n"))


def _seconds_to_stop() -> float:
    return Settings().stop_seconds + _SECONDS_AFTER_CHECKPOINT


def _ending(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"left with status {status}"
