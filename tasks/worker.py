"""A worker process: does jobs one after another, as `tasks.worker_process` sends them.

Requests come as JSON lines on stdin; progress records, results and errors go as JSON lines to what was stdout
when the process started. Everything that anything prints goes to stderr.

SIGTERM asks it to leave, as when a spot instance is taken away: a training first leaves a checkpoint of the step that
it is at, any other job is dropped, and done anew (`execution.images_per_task` says how large the most are). SIGINT is
the parent's to handle, though a terminal sends it to all.
"""

import argparse
import json
import os
import queue
import signal
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any

_CUT_OFF = 70  # Exit status when the parent process is gone.
_STOPPED = 75  # Exit status when it was told to leave.


def main() -> None:
    """Serves jobs until stdin ends."""
    parser = argparse.ArgumentParser(description="A DeMe worker process; started by the worker pool.")
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    device = parser.parse_args().device
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")

    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()

    import torch  # Heavy; done while the parent is still busy.

    from deme_core.errors import DemeError, GpuMemoryError
    from deme_core.settings import Settings
    from tasks.error_messages import error_message
    from tasks.jobs import JOBS, Job
    from tasks.work.base import JobContext, execute_with_room

    context = JobContext(Settings(), device)
    with suppress(DemeError):  # What is wrong with it is for the first job to say.
        _ = context.artifacts  # Half a second of imports, too.
    current: Job | None = None

    def leave(*_: object) -> None:
        if current is None or not current.leaves_checkpoints:
            os._exit(_STOPPED)
        context.stop.set()
        # Half a checkpoint is none: if it is not whole by then, the one before it stays the newest.
        deadline = threading.Timer(context.settings.stop_seconds, os._exit, (_STOPPED,))
        deadline.daemon = True
        deadline.start()

    signal.signal(signal.SIGTERM, leave)
    while not context.stop.is_set():
        current = None
        request = requests.get()
        torch.set_num_threads(request["num_threads"])
        try:
            job = current = JOBS[request["job"]].model_validate(request["content"])
            result = execute_with_room(job, context, lambda record: send(record=record))
            if device == "cuda":
                torch.cuda.empty_cache()  # Another run may be next on this GPU.
            send(result=result.to_dict())
        except Exception as error:  # Every failure is the parent's to handle; this process stays fit for use.
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
                error = GpuMemoryError(job.display_name, str(error).partition(". ")[0], job.memory_mend)
            # But not where it could not leave the other processes of a training, of which one had failed.
            is_of_no_use = torch.distributed.is_initialized()
            send(**error_message(error), traceback=traceback.format_exc(), leaves=is_of_no_use)
            if is_of_no_use:
                break
    os._exit(_STOPPED)


def _read_requests(requests: "queue.Queue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    # The parent closed the pipe or died, perhaps by SIGKILL: nobody wants what is being done here.
    os._exit(_CUT_OFF)


if __name__ == "__main__":
    main()
