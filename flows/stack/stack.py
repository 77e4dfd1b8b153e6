"""The local stack as a whole: started, looked at and stopped. Commands of one DEME_HOME run one at a time."""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from deme_core.errors import DemeError, InputError
from deme_core.local_files import local_errors
from deme_core.settings import Settings
from flows.stack import services
from flows.stack.credentials import CREDENTIALS_NAME, write_private
from flows.stack.leftovers import remove_workspaces
from flows.stack.ports import choose_ports
from flows.stack.processes import (
    ProcessRecord,
    find_started_by,
    ports_of_other_stacks,
    start_detached,
    stop_all,
    stop_tree,
)
from flows.stack.services import Layout, Service
from flows.stack.startup import DeployStart, ServiceStart, Starting, last_words, wait_for

State = Literal["ready", "not answering", "died", "stopped"]
# What is stopped first depends on what is stopped last.
_STOP_ORDER = ("worker", "mlflow", "prefect", "s3")


@dataclass(frozen=True)
class ServiceStatus:
    """What is known of one service.

    Attributes:
        name: of the service.
        state: ready; not answering (it runs); died (it was not stopped); stopped.
        url: where it answers, or what it serves.
        pid: process id, if it runs.
        since: when it was started (ISO 8601, UTC), if it runs.
        problem: what is broken, in a sentence.
    """

    name: str
    state: State
    url: str | None = None
    pid: int | None = None
    since: str | None = None
    problem: str | None = None


class Stack:
    """The stack whose state lies in ``home``.

    Args:
        home: DEME_HOME, absolute.
        say: takes a line for the user.
    """

    def __init__(self, home: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self.home, self._say = home, say
        self._folder = home / "stack"
        self._state_path = self._folder / "state.json"

    def up(self, ports: Mapping[str, int], *, gpu: bool) -> Layout:
        """Starts what does not run, all at once, registers the deployments, and waits until everything is ready.

        Args:
            ports: ports the user asks for, by service.
            gpu: also start a worker for the GPU pool.

        Raises:
            DemeError: something does not start; what this call started is stopped again.
        """
        with self._locked():
            state = self._read()
            alive = [name for name in state["services"] if self._process(state, name)]
            foreign = ports_of_other_stacks(str(self.home))
            self._check_credentials(state)
            layout = Layout(self.home, choose_ports(ports, state["ports"], alive, foreign))
            self._write({**state, "ports": dict(layout.ports)})
            started: list[str] = []
            if not find_started_by(str(self.home)):  # Else a flow run may live whose worker was killed.
                remove_workspaces(str(self.home))
            try:
                self._start(layout, started, gpu=gpu)
            except BaseException:
                self._stop(started)
                raise
        return layout

    def _start(self, layout: Layout, started: list[str], *, gpu: bool) -> None:
        with contextlib.ExitStack() as cleanup:
            first: list[Starting] = [self._launch(services.prefect(layout), started)]
            others: list[Starting] = [
                self._launch(service, started) for service in (services.mlflow(layout), services.s3(layout))
            ]
            if "prefect" in started or not self._read().get("deployed"):
                self._say("registering work pools and deployments")
                first.append(cleanup.enter_context(DeployStart(layout.environment(), self._log("deploy"))))
            # Then the worker: its polls and the registration lock each other out of SQLite, for seconds or a minute.
            wait_for(first, beside=others)
            has_gpu = gpu or "worker-gpu" in self._read()["services"]  # Then it died: `down` takes it off the list.
            for pool in (services.CPU_POOL, *([services.GPU_POOL] if has_gpu else [])):
                self._crash_what_never_began(layout, pool)
                others.append(self._launch(services.worker(layout, pool, since=time.time() - 1.0), started))
            wait_for(others)
        self._write({**self._read(), "deployed": True})

    def _crash_what_never_began(self, layout: Layout, pool: str) -> None:
        """Ends flow runs that were beginning when the last worker was killed: no heartbeat tells of them.

        Each would hold its deployment's place for ever, and the watch has but one.
        """
        if self._process(self._read(), services.worker(layout, pool).name) is None:
            for run in services.crash_beginning_runs(layout, pool):
                self._say(f"flow run {run} never began, since its worker was killed: Crashed")

    def _launch(self, service: Service, started: list[str]) -> Starting:
        """Starts a service unless it runs."""
        state, log = self._read(), self._log(service.name)
        if self._process(state, service.name) is not None:
            # A worker was ready when it was started; its heartbeat is older than this call.
            known = replace(service, check=lambda: None) if service.name.startswith("worker") else service
            return ServiceStart(known, None, log)
        with local_errors(log):
            service.prepare()
            record, process = start_detached(
                service.command, environment=service.environment, folder=self._folder, log=log
            )
        since = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {**asdict(record), "since": since, "url": service.url}
        self._write({**state, "services": {**state["services"], service.name: entry}})
        started.append(service.name)
        self._say(f"starting {service.name}")
        return ServiceStart(service, process, log)

    def down(self) -> list[str]:
        """Stops everything, the worker first; returns the names of what ran."""
        with self._locked():
            stopped = self._stop(list(self._read()["services"]))
            # Flow runs whose worker was killed, and their own workers, belong to nobody else.
            orphans = find_started_by(str(self.home))
            if orphans:
                self._say(f"ending {len(orphans)} processes that lost their worker")
                stop_all(orphans, seconds=15.0)
            remove_workspaces(str(self.home))
        return stopped

    def _stop(self, names: list[str]) -> list[str]:
        stopped = []
        for name in sorted(names, key=lambda name: _STOP_ORDER.index(name.partition("-")[0])):
            process = self._process(self._read(), name)
            if process is not None:
                self._say(f"stopping {name}")
                # A worker asks its flow runs first, which leave checkpoints and say that they were stopped.
                seconds = Settings().stop_seconds + 25.0 if name.startswith("worker") else 15.0
                stop_tree(process, seconds=seconds)
                stopped.append(name)
                if name == "s3":  # SeaweedFS leaves it behind, wherever TMPDIR is; another stack's has the same name.
                    Path(f"/tmp/seaweedfs-s3-{self._read()['ports'].get('s3')}.sock").unlink(missing_ok=True)
            state = self._read()
            self._write({**state, "services": {k: v for k, v in state["services"].items() if k != name}})
        return stopped

    def layout(self) -> Layout:
        """Returns where the stack is.

        Raises:
            InputError: it was never started.
        """
        state = self._read()
        if not state["ports"]:
            raise InputError(f"There is no stack in {self.home}; `deme up` starts one.")
        self._check_credentials(state)
        return Layout(self.home, state["ports"])

    def _check_credentials(self, state: dict[str, Any]) -> None:
        """Raises an InputError if there would be new keys for a server that goes on with the old ones."""
        path = self._folder / CREDENTIALS_NAME
        if self._process(state, "s3") is not None and not path.exists():
            raise InputError(f"{path} is gone, and the S3 server runs with its keys; `deme down`, then `deme up`.")

    def status(self) -> list[ServiceStatus]:
        """Returns how each service fares, the servers first."""
        state = self._read()
        names = dict.fromkeys(["s3", "prefect", "mlflow", "worker", *state["services"]])
        checks = self._checks(state) if state["ports"] else {}
        return [self._examine(state, name, checks.get(name)) for name in names]

    def _checks(self, state: dict[str, Any]) -> dict[str, Callable[[], None]]:
        self._check_credentials(state)
        layout = Layout(self.home, state["ports"])
        built = [services.s3(layout), services.prefect(layout), services.mlflow(layout)]
        pools = (services.CPU_POOL, services.GPU_POOL)
        built += [services.worker(layout, pool, since=time.time() - 120.0) for pool in pools]
        return {service.name: service.check for service in built}

    def _examine(self, state: dict[str, Any], name: str, check: Callable[[], None] | None) -> ServiceStatus:
        entry = state["services"].get(name)
        if entry is None or check is None:
            return ServiceStatus(name, "stopped")
        process = self._process(state, name)
        if process is None:
            problem = f"pid {entry['pid']} is gone; {last_words(self._log(name))} `deme up` starts it again."
            return ServiceStatus(name, "died", url=entry["url"], problem=problem)
        known = {"url": entry["url"], "pid": entry["pid"], "since": entry["since"]}
        try:
            check()
        except Exception as error:  # Whatever keeps a service from answering is its state.
            return ServiceStatus(name, "not answering", **known, problem=f"{error}; see {self._log(name)}")
        return ServiceStatus(name, "ready", **known)

    def _process(self, state: dict[str, Any], name: str) -> psutil.Process | None:
        entry = state["services"].get(name)
        return ProcessRecord(entry["pid"], entry["created"], entry.get("boot", "")).find() if entry else None

    def _log(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"

    def _read(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"ports": {}, "services": {}}
        try:
            return {**empty, **json.loads(self._state_path.read_text())}
        except FileNotFoundError:
            return empty
        except (ValueError, TypeError) as error:  # No JSON, or another kind of it.
            raise DemeError(f"{self._state_path} is damaged; end its processes by hand and remove it.") from error

    def _write(self, state: Mapping[str, Any]) -> None:
        with local_errors(self._state_path):
            write_private(self._state_path, json.dumps(state, indent=1))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with local_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            # Inherited by no service: a lock ends with the process that took it.
            lock = (self._folder / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._say("waiting for another deme command of this stack")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
