"""A worker process of the pool, and the pipes to it: jobs go in, progress records, results and errors come out.

The other end of the pipes is `tasks.worker`.
"""

import json
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

from deme_core.errors import RunEndedError, WorkerDiedError, WorkerStoppedError
from tasks.error_messages import job_error
from tasks.gpu_lock import GpuLock
from tasks.jobs import Job, JobResult
from tasks.progress import Report
from tasks.slots import Slot

_SECONDS_TO_LEAVE = 10.0
# By these accelerate and torch take a process for one of many that srun, mpirun, torchrun or `accelerate launch` began,
# and wait for the others or train otherwise. Those of our own trainings are set in the worker, when they begin.
_OF_LAUNCHERS = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NODE_RANK|MASTER_(ADDR|PORT)|FORK_LAUNCHED"
    r"|(ACCELERATE|TORCHELASTIC|PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_.*|MPI_LOCAL.*)"
)


class WorkerProcess:
    """One process and the pipes to it, started for its first job and again for one that finds it dead.

    Args:
        slot: where it runs.
        log: takes what it writes to stderr, line by line.
        seconds_to_stop: what a training that is told to leave gets for its checkpoint.
    """

    def __init__(self, slot: Slot, log: Callable[[str], None], seconds_to_stop: float) -> None:
        self._slot, self._log = slot, log
        self._gpus = set(slot.gpu.split(",")) if slot.gpu is not None else set()
        self.gpu_lock = GpuLock(self._gpus)
        self._process: subprocess.Popen[str] | None = None
        self._is_busy = self._is_dismissed = False
        self._lock = threading.Lock()
        self._seconds_to_stop = seconds_to_stop

    @property
    def gpu(self) -> str | None:
        """As its slot has it."""
        return self._slot.gpu

    @property
    def num_gpus(self) -> int:
        """0 on CPU."""
        return len(self._gpus)

    def shares_gpus(self, other: "WorkerProcess") -> bool:
        """Whether both are given one GPU, or more."""
        return not self._gpus.isdisjoint(other._gpus)

    def start(self) -> None:
        """Starts the process, unless it runs.

        Raises:
            RunEndedError: it was told to stop before.
        """
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._is_dismissed:  # Nobody would end what started now.
            raise RunEndedError
        if self._process is not None and self._process.poll() is None:
            return
        environment = {name: value for name, value in os.environ.items() if not _OF_LAUNCHERS.fullmatch(name)}
        # PYTHONSAFEPATH: else Python would import what lies in the folder where `deme` was called, and so its children.
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
        """Does ``job``, while it does no other, and returns its result.

        Args:
            job: what to do.
            report: called with every progress record, in the caller's thread.

        Raises:
            DemeError: the job failed; of the class it failed with, where DeMe foresaw it.
            WorkerDiedError: the process ended before the job did.
            RunEndedError: it was told to stop before.
        """
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
            f"The worker process of {job.display_name} {_ending(self._process.wait())} before its job "
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


def _ending(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"left with status {status}"
