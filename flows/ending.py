"""How the command line ends: by an error, a signal or Ctrl-C, each with a sentence and its exit code."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus

from rich.console import Console

from deme_core.errors import DemeError, InputError
from flows.terminal import say

_STOPPED, _INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT
_SAID = {_STOPPED: "stopped", _INTERRUPTED: "interrupted"}
# What a server may take to hear of the end, after the last checkpoints of trainings.
_SECONDS_TO_TELL = 15.0
_NO_LOGIN = (
    "Prefect's server wants a log-in: PREFECT_API_AUTH_STRING is missing or wrong; `deme env` prints that of the local "
    "stack."
)


def run_to_its_end(app: Callable[[], None]) -> None:
    """Run the command line; what DeMe foresaw is one sentence, with its exit code."""
    # Prefect's flows handle it, and then call this, so that it is said how the command ended.
    signal.signal(signal.SIGTERM, _leave)
    try:
        app()
    except DemeError as error:
        say(Console(stderr=True), f"deme: {error}", style="red")
        sys.exit(error.exit_code)
    except Exception as error:
        # Prefect's own, without its import; deme --help does without.
        status = getattr(getattr(error, "response", None), "status_code", None)
        if type(error).__name__ != "PrefectHTTPStatusError" or status != HTTPStatus.UNAUTHORIZED:
            raise
        say(Console(stderr=True), f"deme: {_NO_LOGIN}", style="red")
        sys.exit(InputError.exit_code)
    except SystemExit as leaving:  # Typer makes one of Ctrl-C, too.
        if leaving.code in _SAID:
            Console(stderr=True).print(_sentence(leaving.code), style="red")
        raise


def leave_in_time_after_interrupt() -> None:
    """Have Ctrl-C end this process in time, though Prefect would try for minutes to reach a server that is away."""
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: object) -> None:
    from deme_core.settings import Settings

    timer = threading.Timer(Settings().stop_seconds + _SECONDS_TO_TELL, _leave_at_once)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _leave_at_once() -> None:
    os.write(2, f"{_sentence(_INTERRUPTED)}\n".encode())
    os._exit(_INTERRUPTED)


def _sentence(code: int) -> str:
    return f"deme: {_SAID[code]}; run the same command again to go on."


def _leave(*_: object) -> None:
    sys.exit(_STOPPED)
