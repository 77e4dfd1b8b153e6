"""How the command line ends: by an error, a signal or Ctrl-C, each with a sentence and its exit code."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus

from rich.console import Console

from deme_core.errors import DemeError, InputError
from flows.terminal import say

_STOPPED = 128 + signal.SIGTERM
_NO_LOGIN = (
    "Prefect's server wants a log-in: PREFECT_API_AUTH_STRING is missing or wrong; `deme env` prints that of the local "
    "stack."
)
_INTERRUPTED = "interrupted; run the same command again to go on."
# What the last checkpoint of a training may take.
_SECONDS_TO_LEAVE = 28.0


def run_to_its_end(app: Callable[[], None]) -> None:
    """Run the command line; what DeMe foresaw is one sentence, with its exit code."""
    # Prefect's flows handle it, and then call this: without it a temporary server would outlive its command.
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
    except SystemExit as leaving:
        if leaving.code == _STOPPED:
            Console(stderr=True).print("deme: stopped; run the same command again to go on.", style="red")
        raise
    except KeyboardInterrupt:
        Console(stderr=True).print(f"deme: {_INTERRUPTED}", style="red")
        sys.exit(130)


def leave_soon_after_interrupt() -> None:
    """Have Ctrl-C end this process within seconds, though Prefect would try to reach its own server for minutes."""
    signal.signal(signal.SIGINT, _interrupt)


def _leave(*_: object) -> None:
    sys.exit(_STOPPED)


def _interrupt(*_: object) -> None:
    threading.Thread(target=_leave_soon, daemon=True).start()
    raise KeyboardInterrupt


def _leave_soon() -> None:
    """A terminal sends Ctrl-C to Prefect's temporary server, too, which is gone when Prefect looks for it."""
    if runtime := sys.modules.get("flows.flow_runtime"):
        runtime.ended.wait(_SECONDS_TO_LEAVE)
    time.sleep(3.0)
    os.write(2, f"deme: {_INTERRUPTED}\n".encode())
    os._exit(130)
