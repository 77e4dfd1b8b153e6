"""A running platform, as the tests see it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from mlflow import MlflowClient

from deme_core.settings import Settings
from tests.e2e.command_line import CommandLine

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Platform:
    """A running stack and what a user's shell knows of it."""

    deme: CommandLine
    variables: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return self.deme.environment | self.variables

    @property
    def settings(self) -> Settings:
        """Returns the settings of a program in the user's shell."""
        return Settings.model_validate(self.environment)

    def pid(self, service: str) -> int:
        """Returns the process id of a service of the stack."""
        pid: int = json.loads(self.deme.run("status", "--json").stdout)[service]["pid"]
        return pid

    def api(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        """Asks Prefect's server; a 503 (SQLite was locked) is asked again, as Prefect's own client does."""
        for seconds in (1, 2, 4, 8, 0):
            answer = httpx.request(
                method,
                f"{self.variables['PREFECT_API_URL']}/{path}",
                auth=httpx.BasicAuth(*self.variables["PREFECT_API_AUTH_STRING"].split(":")),
                json=content,
                timeout=30,
            )
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(seconds)
        return answer.raise_for_status().json() if answer.content else None

    def prefect(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, recipe: str, *overrides: str) -> str:
        """Starts deme/full as users do and returns the id of the flow run."""
        return self.start_deployment("deme/full", recipe=recipe, overrides=list(overrides))

    def start_deployment(self, name: str, **parameters: Any) -> str:
        """Starts a deployment as users do and returns the id of the flow run."""
        out = self.prefect("deployment", "run", name, "--params", json.dumps(parameters))
        return next(line.split()[-1] for line in out.splitlines() if "UUID" in line)

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """Returns the runs of a flow, newest first."""
        content = {"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_DESC"}
        found: list[dict[str, Any]] = self.api("POST", "flow_runs/filter", content)
        return found

    def state(self, flow_run: str) -> dict[str, Any]:
        state: dict[str, Any] = self.api("GET", f"flow_runs/{flow_run}")["state"]
        return state

    def wait(self, flow_run: str, until: Callable[[dict[str, Any]], bool], seconds: float = 150) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not until(state := self.state(flow_run)):
            assert time.monotonic() < deadline, f"after {seconds} s the flow run is still {state}"
            time.sleep(0.5)
        return state

    def report(self, recipe: str, *overrides: str) -> dict[str, Any]:
        """Runs deme/full to its end and returns what `deme follow` says."""
        flow_run = self.start(recipe, *overrides)
        done = self.deme.run("follow", flow_run, "--json", extra=self.variables)
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report

    def tasks(self, flow_run: str) -> dict[str, str]:
        """Returns the state of each task run, by name."""
        found = self.api("POST", "task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
        return {task["name"]: task["state_type"] for task in found}

    def experiment(self, name: str) -> str:
        """Returns the id of an MLflow experiment."""
        found = MlflowClient(self.variables["MLFLOW_TRACKING_URI"]).get_experiment_by_name(name)
        assert found is not None
        return str(found.experiment_id)

    def processes(self, flow_run: str) -> list[psutil.Process]:
        """Returns the processes of a flow run: its engine and the engine's workers."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("PREFECT__FLOW_RUN_ID") == flow_run:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_for_work(self, flow_run: str, task: str) -> psutil.Process:
        """Waits until a task of the flow run is in the middle of its work; returns the flow's process."""
        deadline = time.monotonic() + 90
        while self.tasks(flow_run).get(task) != "RUNNING":
            assert time.monotonic() < deadline, self.tasks(flow_run)
            time.sleep(0.2)
        return next(p for p in self.processes(flow_run) if "prefect.engine" in " ".join(p.cmdline()))


def belongs(process: psutil.Process, home: Path) -> bool:
    try:
        return process.environ().get("DEME_STACK") == str(home)
    except psutil.Error:
        return False
