"""A Prefect worker that lets flow runs end by themselves when it is stopped.

Prefect's own kills them within a tenth of a second: no training leaves a checkpoint, and Prefect and MLflow go on
showing them as running.
"""

import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

import psutil
from prefect.cli import app as prefect_command
from prefect.client.orchestration import get_client
from prefect.states import Crashed
from prefect.utilities import processutils

from deme_core.settings import Settings

# The flow tells Prefect and MLflow when its trainings have left their checkpoints.
_SECONDS_TO_TELL = 13.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_RUN_ID = "PREFECT__FLOW_RUN_ID"


def start_worker(arguments: Sequence[str]) -> None:
    """Does what `prefect worker start` does with these arguments, until it is stopped.

    Raises:
        InputError: the environment says no number of seconds for checkpoints.
    """
    seconds = Settings().stop_seconds + _SECONDS_TO_TELL
    install = processutils.setup_signal_handlers_worker

    def install_ours(*args: Any, **kwargs: Any) -> None:
        install(*args, **kwargs)
        _let_flows_end_before({signum: signal.getsignal(signum) for signum in _SIGNALS}, seconds=seconds)

    processutils.setup_signal_handlers_worker = install_ours
    sys.argv = ["prefect", "worker", "start", *arguments]
    prefect_command()


def _let_flows_end_before(prefects: dict[signal.Signals, Any], *, seconds: float) -> None:
    """Installs handlers that end the flow runs first, in so many seconds, and then do what Prefect's do."""

    def handle(signum: int, frame: Any) -> None:
        for each in _SIGNALS:  # Whoever asks again, as a terminal does, is heard when the runs have ended.
            signal.signal(each, signal.SIG_IGN)
        try:
            # In the worker's only thread: it takes no new run meanwhile.
            end_flow_runs(psutil.Process().children(), seconds=seconds)
        finally:
            for each, handler in prefects.items():
                signal.signal(each, handler)
            prefects[signal.Signals(signum)](signum, frame)

    for each in _SIGNALS:
        signal.signal(each, handle)


def end_flow_runs(processes: Sequence[psutil.Process], *, seconds: float) -> None:
    """Sends SIGTERM to the processes of flow runs, waits for them, and has Prefect know of those that said nothing.

    Args:
        processes: one for each flow run.
        seconds: how long all of them may take together.
    """
    runs = dict(_named(processes))
    for process in runs:
        with suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + seconds
    # Not waited for as children: the worker, which does that, is not at work now.
    while time.monotonic() < deadline and any(map(_is_alive, runs)):
        time.sleep(0.1)
    with suppress(Exception):  # Prefect may be away; then its heartbeats tell, or the next start of a local stack.
        _crash(runs.values(), "Its worker was stopped.")


def _named(processes: Sequence[psutil.Process]) -> Iterator[tuple[psutil.Process, UUID]]:
    for process in processes:
        with suppress(psutil.Error, OSError, KeyError, ValueError):
            yield process, UUID(process.environ()[_RUN_ID])


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _crash(runs: Iterable[UUID], message: str) -> None:
    """Calls flow runs Crashed that are not in a final state."""
    with get_client(sync_client=True) as client:
        for run in runs:
            state = client.read_flow_run(run).state
            if state is None or not state.is_final():
                client.set_flow_run_state(run, Crashed(message=message), force=True)
