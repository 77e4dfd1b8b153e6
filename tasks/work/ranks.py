"""The other processes of a data-parallel training: children of the worker, which do its job with their own shares.

The worker, rank 0, alone publishes and reports. Where a child dies the worker must not wait for it for ever: the job
fails, and whoever supervises it has it done again, from the last checkpoint.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from deme_core.data_parallel import Share, join
from deme_core.errors import DemeError, InputError, WorkerDiedError, WorkerStoppedError
from deme_core.settings import Settings
from tasks.jobs import JOBS, Job
from tasks.work.base import JobContext

_LOST_A_RANK = 71  # Exit status.
# NCCL does not notice that a process has died; others do, and then say why.
_SECONDS_TO_NOTICE = 10.0
_SECONDS_TO_DIE = 3.0


@contextlib.contextmanager
def all_ranks(job: Job, digest: str, context: JobContext) -> Iterator[None]:
    """Makes this process rank 0 of as many as ``job`` asks for, and starts the others.

    Raises:
        InputError: there are fewer GPUs.
        WorkerDiedError: one of them ended.
    """
    count, num_threads = job.num_processes, torch.get_num_threads()
    if context.device == "cuda" and torch.cuda.device_count() < count:
        raise InputError(f"num_processes is {count}, but this worker has {torch.cuda.device_count()} GPUs; lower it.")
    torch.set_num_threads(max(num_threads // count, 1))
    lost, dismissed = threading.Event(), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        point = Path(folder) / "meeting-point"
        order = {"job": type(job).__name__, "content": job.model_dump(mode="json"), "digest": digest}
        others: list[subprocess.Popen[str]] = []
        try:
            for rank in range(1, count):
                own = order | {"rank": rank, "meeting_point": str(point)}
                others.append(_start(own, context.device, lost, dismissed))
            with join(Share(0, count), point, context.device):
                yield
        except Exception as error:
            # The connection may break a moment before the process is seen to be gone.
            if isinstance(error, DemeError) or not lost.wait(_SECONDS_TO_DIE):
                raise
            said = "".join(f" ({path.read_text()})" for path in sorted(Path(folder).glob("error-*")))
            raise WorkerDiedError(f"One process of a data-parallel training ended before the others{said}.") from error
        finally:
            dismissed.set()
            torch.set_num_threads(num_threads)
            for other in others:
                other.kill()  # It holds nothing that is not here.
                other.wait()


def _start(
    order: dict[str, Any], device: str, lost: threading.Event, dismissed: threading.Event
) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        # -P: modules of the user's current folder are none of ours.
        [sys.executable, "-P", "-m", "tasks.work.ranks", "--device", device, "--threads", str(torch.get_num_threads())],
        stdin=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()  # And left open: when this process ends, so does that one.

    def leave_with_it() -> None:
        process.wait()
        lost.set()
        if not dismissed.wait(_SECONDS_TO_NOTICE):
            os._exit(_LOST_A_RANK)

    threading.Thread(target=leave_with_it, daemon=True).start()
    return process


def main() -> None:
    """Does a job as one of the ranks after the first."""
    parser = argparse.ArgumentParser(description="A process of a data-parallel training; started by its rank 0.")
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # The parent's to handle, though a service manager or terminal sends them to all: this process leaves with it.
    for signal_to_all in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_to_all, signal.SIG_IGN)
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    job = JOBS[order["job"]].model_validate(order["content"])
    context = JobContext(Settings(), arguments.device)
    share = Share(order["rank"], job.num_processes)
    point = Path(order["meeting_point"])
    with _told(point.with_name(f"error-{share.rank}")):
        _train_along(job, order["digest"], context, share, point)
    threading.Event().wait()  # What is left to store is for rank 0 alone, which ends this process.


def _train_along(job: Job, digest: str, context: JobContext, share: Share, point: Path) -> None:
    """Trains until rank 0 does no more; over NCCL it returns when that has left, too."""
    work = import_module(f"tasks.work.{job.work}")
    with join(share, point, context.device), context.scratch_folder() as out, contextlib.suppress(WorkerStoppedError):
        for record in work.run(job, context, out, digest):
            if record.get("global_step") == record.get("num_steps", 0):
                break


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Leaves for rank 0 what went wrong here, and ends the process at once: NCCL could wait for others at its end."""
    try:
        yield
    except Exception as error:
        path.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        traceback.print_exc()
        os._exit(1)


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(_LOST_A_RANK)


if __name__ == "__main__":
    main()
