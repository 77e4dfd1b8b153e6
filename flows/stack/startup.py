"""What is starting, side by side: whatever fails is told at once, whatever else is still waited for."""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self
from urllib.parse import urlsplit

from deme_core.errors import DemeError
from deme_core.local_files import local_errors
from flows.stack.processes import listener, start_detached
from flows.stack.services import Service

_SECONDS_TO_START = 300.0  # What died is noticed at once; what is only slow is waited for.
_POLL_SECONDS = 0.2


class Starting(Protocol):
    """Something that becomes ready."""

    def is_ready(self) -> bool:
        """Looks; raises DemeError if it never will be."""


class ServiceStart:
    """A service of the stack that was started, or ran already.

    Args:
        service: what.
        process: its process; None if it ran already.
        log: where its output goes.
    """

    def __init__(self, service: Service, process: "subprocess.Popen[bytes] | None", log: Path) -> None:
        self.process = process
        self._service, self._log = service, log
        self._deadline = time.monotonic() + _SECONDS_TO_START
        self._ready = False

    def is_ready(self) -> bool:
        """Asks the service, until it has said yes once."""
        if not self._ready:
            try:
                self._service.check()
            except Exception as error:  # Whatever a server that is starting answers.
                self._give_up_on(error)
            else:
                self._check_answerer()
                self._ready = True
        return self._ready

    def _check_answerer(self) -> None:
        """Raises a DemeError if another stack, started at the same moment, has the port and answers in our place."""
        port = urlsplit(self._service.url).port if "://" in self._service.url else None
        found = listener(port) if port and self.process else None
        if found is None or self.process is None:
            return
        if self.process.pid not in (found.pid, *(parent.pid for parent in found.parents())):
            raise DemeError(
                f"{self._service.name} cannot have port {port}, which {found.name()} (pid {found.pid}) took meanwhile; "
                "run `deme up` again."
            )

    def _give_up_on(self, error: Exception) -> None:
        if self.process is not None and self.process.poll() is not None:
            raise DemeError(f"{self._service.name} stopped at its start: {last_words(self._log)}") from error
        if time.monotonic() > self._deadline:
            raise DemeError(
                f"{self._service.name} at {self._service.url} was not ready in {_SECONDS_TO_START:.0f} s ({error}); "
                f"see {self._log}."
            ) from error


class DeployStart:
    """`deme deploy`, which imports all flows while the Prefect server starts and then registers them.

    A process of its own, since Prefect reads its settings once, when it is imported.

    Args:
        environment: points at the server.
        log: where its output goes.
    """

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        command = [sys.executable, "-P", "-m", "flows.cli", "deploy", "--wait", f"{_SECONDS_TO_START:.0f}"]
        with local_errors(log):
            _, self.process = start_detached(command, environment=environment, folder=log.parent, log=log)

    def __enter__(self) -> Self:
        """Runs already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process if it still runs: the start failed."""
        self.process.kill()
        self.process.wait()

    def is_ready(self) -> bool:
        """Whether everything is registered."""
        status = self.process.poll()
        if status:
            raise DemeError(f"The deployments could not be registered: {last_words(self._log).removeprefix('deme: ')}")
        return status == 0


def wait_for(wanted: Sequence[Starting], *, beside: Sequence[Starting] = ()) -> None:
    """Waits until all that is ``wanted`` is ready.

    Args:
        wanted: what to wait for.
        beside: what else is starting: if it fails, waiting is over too.

    Raises:
        DemeError: something does not start.
    """
    while True:
        ready = [each.is_ready() for each in (*wanted, *beside)]  # All are looked at: any may have failed.
        if all(ready[: len(wanted)]):
            return
        time.sleep(_POLL_SECONDS)


def last_words(log: Path) -> str:
    """Returns the last line of a log, and where all of it is."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"{last[:200]} (all of it is in {log})."
