"""Processes that outlive the command that started them, recognised again by pid and start time."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

# In the environment of all that a stack starts, and so of what those processes start in turn.
STACK_VARIABLE = "DEME_STACK"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Of the same environments: the servers that those processes talk to.
_ADDRESSES = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL")


@dataclass(frozen=True)
class ProcessRecord:
    """A process, so that another one that was given its pid later is not taken for it.

    The system tells start times since the epoch, which move when the clock is set; those since its boot do not.

    Attributes:
        pid: process id.
        created: start time in seconds since the system's boot.
        boot: which boot that was, where the system tells; else nothing.
    """

    pid: int
    created: float
    boot: str = ""

    @classmethod
    def of(cls, pid: int) -> "ProcessRecord":
        """Returns the record of a process that runs; psutil.Error if it does not."""
        return cls(pid, _seconds_since_boot(psutil.Process(pid)), _boot())

    def find(self) -> psutil.Process | None:
        """Returns the process if it still runs."""
        try:
            process = psutil.Process(self.pid)
            # Linux tells the time of its boot in whole seconds; a pid is not reused within two.
            alike = self.boot == _boot() and abs(_seconds_since_boot(process) - self.created) < 2.0
            return process if alike and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


def _seconds_since_boot(process: psutil.Process) -> float:
    return float(process.create_time() - psutil.boot_time())


def _boot() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def start_detached(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path
) -> tuple[ProcessRecord, "subprocess.Popen[bytes]"]:
    """Starts a process in a session of its own, in ``folder``, with its output appended to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
    return ProcessRecord.of(process.pid), process


def stop_tree(process: psutil.Process, *, seconds: float) -> None:
    """Ends a process and all that it started: politely, and after ``seconds`` by force."""
    with contextlib.suppress(psutil.Error):
        family = [process, *process.children(recursive=True)]
        # The first is asked alone: a server ends its own children in the right order.
        process.terminate()
        psutil.wait_procs([process], timeout=seconds)
        stop_all(family, seconds=2.0)


def stop_all(processes: Iterable[psutil.Process], *, seconds: float) -> None:
    """Ends processes that are asked all at once, and after ``seconds`` by force."""
    alive = [process for process in processes if process.is_running()]
    for sent, wait in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5.0)):
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.send_signal(sent)
        _, alive = psutil.wait_procs(alive, timeout=wait)


def find_started_by(stack: str) -> list[psutil.Process]:
    """Returns the processes with `STACK_VARIABLE` = ``stack`` in their environment, this one excepted."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(STACK_VARIABLE) == stack:
                found.append(process)
    return found


def ports_of_other_stacks(stack: str) -> dict[int, str]:
    """Returns the ports that processes of other stacks talk to, and which processes: nothing need listen there.

    A worker outlives servers that were killed, and would take the flow runs of any server that gets their port.
    """
    found: dict[int, str] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            if environment.get(STACK_VARIABLE, stack) != stack:
                ports = {urlsplit(environment.get(name, "")).port for name in _ADDRESSES}
                found |= {port: f"{process.name()} (pid {process.pid})" for port in ports if port}
    return found


def who_listens(port: int) -> str | None:
    """Returns the name and pid of what listens on a loopback ``port``; None if nothing does, or it is hidden."""
    with contextlib.suppress(psutil.Error):
        if found := listener(port):
            return f"{found.name()} (pid {found.pid})"
    return None


def listener(port: int) -> psutil.Process | None:
    """Returns what listens on a loopback ``port``; None if nothing does, or it is hidden."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return psutil.Process(connection.pid)
    return None
