"""A worker process: does jobs one after another, as `tasks.worker_pool` sends them.

Requests come as JSON lines on stdin; progress records, results and errors go as JSON lines to what was stdout
when the process started. Everything that anything prints goes to stderr.

SIGTERM asks it to leave, as when a spot instance is taken away: a training first leaves a checkpoint of the step that
it is at, any other job is so small a slice that it is simply dropped. SIGINT is the parent's to handle, though a
terminal sends it to all.
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
# Spot instances give 30 seconds between SIGTERM and SIGKILL, as Kubernetes and Prefect do.
_SECONDS_TO_STOP = 25.0


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
    from tasks.work.base import JobContext, execute

    context = JobContext(Settings(), device)
    with suppress(DemeError):  # What is wrong with it is for the first job to say.
        _ = context.artifacts  # Half a second of imports, too.
    current: Job | None = None

    def leave(*_: object) -> None:
        if current is None or not current.leaves_checkpoints:
            os._exit(_STOPPED)
        context.stop.set()
        # Half a checkpoint is none: if it is not whole by then, the one before it stays the newest.
        deadline = threading.Timer(_SECONDS_TO_STOP, os._exit, (_STOPPED,))
        deadline.daemon = True
        deadline.start()

    signal.signal(signal.SIGTERM, leave)
    while not context.stop.is_set():
        current = None
        request = requests.get()
        torch.set_num_threads(request["num_threads"])
        try:
            job = current = JOBS[request["job"]].model_validate(request["content"])
            result = execute(job, context, lambda record: send(record=record))
            if device == "cuda":
                torch.cuda.empty_cache()  # Another run may be next on this GPU.
            send(result=result.to_dict())
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            reason = str(error).partition(". ")[0]
            mended = GpuMemoryError(getattr(job, "label", job.stage), reason, job.memory_mend)
            send(**error_message(mended), traceback=traceback.format_exc())
        except Exception as error:  # Every failure is the parent's to handle; this process stays fit for use.
            send(**error_message(error), traceback=traceback.format_exc())
    os._exit(_STOPPED)


def _read_requests(requests: "queue.Queue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    # The parent closed the pipe or died, perhaps by SIGKILL: nobody wants what is being done here.
    os._exit(_CUT_OFF)


if __name__ == "__main__":
    main()
