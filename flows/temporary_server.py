"""Prefect's server for one command, where no other is named.

Prefect would start one itself, but only when the flow begins, and import the whole server into this process to do so;
it would take orders from every user of the machine, and outlive a command that is killed. This one starts beside the
imports of the flow, wants a password, and ends with the process that started it.
"""

import atexit
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading

import httpx

from deme_core.errors import DemeError

_HOST = "127.0.0.1"
_SECONDS_TO_END = 5.0


class TemporaryServer:
    """A process with Prefect's server in it, which begins to start at once, and ends when this process does."""

    def __init__(self) -> None:
        self._login = f"deme:{secrets.token_urlsafe(32)}"
        # It listens before there is anybody to answer, so that the first request only has to wait.
        with socket.create_server((_HOST, 0)) as listening:
            self._url = f"http://{_HOST}:{listening.getsockname()[1]}/api"
            environment = {
                "PREFECT_SERVER_API_AUTH_STRING": self._login,
                "PREFECT_UI_ENABLED": "0",
                # As Prefect has it for servers of its own: without what only many users need.
                "PREFECT__SERVER_EPHEMERAL": "1",
                "PREFECT__SERVER_FINAL": "1",
            }
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.temporary_server", str(listening.fileno())],
                stdin=subprocess.PIPE,
                stdout=2,
                env=os.environ | environment,
                pass_fds=[listening.fileno()],
                process_group=0,  # A terminal sends Ctrl-C to all of ours.
            )
        self._has_answered = False
        # What is registered first comes last: Prefect's own, which sends what is left to send, comes before.
        atexit.register(self._stop)

    def connect(self) -> None:
        """Waits until it answers and makes it the server of this process, unless Prefect's settings name another.

        Raises:
            DemeError: it does not answer.
        """
        from prefect.context import refresh_global_settings_context

        if not _is_wanted():
            return
        patience = float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"])
        try:
            with httpx.Client(timeout=patience, trust_env=False) as client:
                client.get(f"{self._url}/health").raise_for_status()
        except httpx.HTTPError as error:
            raise DemeError(
                f"Prefect's temporary server did not start ({error}); --verbose shows what it says."
            ) from error
        self._has_answered = True
        # It has no pages that a log could name.
        os.environ |= {"PREFECT_API_URL": self._url, "PREFECT_API_AUTH_STRING": self._login, "PREFECT_UI_URL": ""}
        refresh_global_settings_context()

    def _stop(self) -> None:
        if not self._has_answered:  # There is nothing that it could lose.
            self._process.kill()
        try:
            self._process.communicate(timeout=_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _is_wanted() -> bool:
    """Whether neither a profile nor a file of Prefect's names a server, or says that there must be one."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    return settings.api.url is None and settings.server.ephemeral.enabled


def _serve(listening: socket.socket) -> None:
    """Serves until stdin ends, as it does when the parent closes it or is killed."""
    # A cluster may send them to all: the flow has yet to tell the server how it ended.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    import uvicorn

    if not _is_wanted():
        return
    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    server = uvicorn.Server(config)

    def serve() -> None:
        try:
            server.run(sockets=[listening])
        finally:
            os._exit(0)

    thread = threading.Thread(target=serve, daemon=True)  # In the main thread it would handle signals.
    thread.start()
    sys.stdin.read()
    server.should_exit = True
    thread.join(_SECONDS_TO_END)
    os._exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
