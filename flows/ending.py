"""How the command line ends: by an error, a signal or Ctrl-C, each with a sentence and its exit code."""

import signal
import sys
from collections.abc import Callable
from http import HTTPStatus

from rich.console import Console

from deme_core.errors import DemeError, InputError
from flows.terminal import say

_SAID = {128 + signal.SIGTERM: "stopped", 128 + signal.SIGINT: "interrupted"}
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
            how = _SAID[leaving.code]
            Console(stderr=True).print(f"deme: {how}; run the same command again to go on.", style="red")
        raise


def _leave(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)
