"""The platform as a team uses it: a real Prefect server and worker, MLflow and S3, all on free loopback ports."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from tests.e2e.conftest import CommandLine, WriteRecipe

METRIC = "fd_efficientnet_lite0"
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Platform:
    """A running stack and what a user's shell knows of it."""

    deme: CommandLine
    variables: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return self.deme.environment | self.variables

    def api(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        answer = httpx.request(method, f"{self.variables['PREFECT_API_URL']}/{path}", json=content, timeout=30)
        return answer.raise_for_status().json()

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
        content = {"recipe": recipe, "overrides": list(overrides)}
        out = self.prefect("deployment", "run", "deme/full", "--params", json.dumps(content))
        return next(line.split()[-1] for line in out.splitlines() if "UUID" in line)

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


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    deme = CommandLine(tmp_path_factory.mktemp("platform"))
    done = deme.run("up")
    assert done.returncode == 0, done.stderr
    try:
        exported = [line.removeprefix("export ").split("=", 1) for line in deme.run("env").stdout.splitlines()]
        yield Platform(deme, {name: value.strip("'") for name, value in exported})
    finally:
        deme.run("down")
        left = [p for p in psutil.process_iter() if _belongs(p, deme.home)]
        assert not left, left


def _belongs(process: psutil.Process, home: Path) -> bool:
    try:
        return process.environ().get("DEME_STACK") == str(home)
    except psutil.Error:
        return False


@pytest.fixture(scope="session")
def full_report(platform: Platform, write_recipe: WriteRecipe) -> dict[str, Any]:
    return platform.report(write_recipe())


def test_status_names_every_service_and_its_process(platform: Platform) -> None:
    found = json.loads(platform.deme.run("status", "--json").stdout)
    assert list(found) == ["s3", "prefect", "mlflow", "worker"]
    for service in found.values():
        assert service["state"] == "ready"
        assert psutil.pid_exists(service["pid"])


def test_nothing_listens_beyond_loopback(platform: Platform) -> None:
    ours = {p.pid for p in psutil.process_iter() if _belongs(p, platform.deme.home)}
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours]
    assert len(listening) >= 3
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::1"}


def test_credentials_are_private_and_in_no_command_line(platform: Platform) -> None:
    kept = platform.deme.home / "stack" / "credentials.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    secret = platform.variables["AWS_SECRET_ACCESS_KEY"]
    assert not [p for p in psutil.process_iter() if secret in " ".join(_cmdline(p))]
    for log in (platform.deme.home / "stack" / "logs").iterdir():
        assert secret not in log.read_text(errors="replace")


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_prefect_shows_rows_pictures_verdict_and_progress(platform: Platform, full_report: dict[str, Any]) -> None:
    found = platform.api(
        "POST", "artifacts/filter", {"flow_runs": {"id": {"any_": [full_report["flow_run_id"]]}}, "limit": 100}
    )
    by_key = {artifact["key"]: artifact for artifact in found}
    rows = json.loads(by_key["toy-rows"]["data"])
    assert [row["row"] for row in rows] == ["pretrained", "finetuned", "ensemble", "merged"]
    assert full_report["mlflow_run_id"] in by_key["toy-verdict"]["data"]
    picture = httpx.get(by_key["toy-samples"]["data"], timeout=30)
    assert picture.content.startswith(b"\x89PNG")
    assert by_key["finetune-segment-1-500-1000"]["data"] == 100.0


def test_workers_log_into_the_run(platform: Platform, full_report: dict[str, Any]) -> None:
    assert platform.tasks(full_report["flow_run_id"])["finetune segment 1 [500, 1000)"] == "COMPLETED"


def test_the_champion_loads_in_stock_diffusers(platform: Platform, full_report: dict[str, Any], tmp_path: Path) -> None:
    assert full_report["registry"]["model"] == "deme-toy"
    client = MlflowClient(platform.variables["MLFLOW_TRACKING_URI"])
    challenger = client.get_model_version_by_alias("deme-toy", "challenger")
    assert challenger.version == full_report["registry"]["version"]
    assert challenger.tags["deme.reason"]
    script = (
        "import sys, mlflow\n"
        "from diffusers import DDPMPipeline\n"
        "folder = mlflow.artifacts.download_artifacts('models:/deme-toy@challenger', dst_path=sys.argv[1])\n"
        "print(sum(p.numel() for p in DDPMPipeline.from_pretrained(folder).unet.parameters()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=platform.environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 1000


def test_the_same_run_again_computes_nothing_and_registers_nothing(
    platform: Platform, full_report: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    again = platform.report(write_recipe())
    assert again["merged"] == full_report["merged"]
    assert again["registry"]["version"] == full_report["registry"]["version"]
    client = MlflowClient(platform.variables["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{again['mlflow_run_id']}'")
    assert {child.data.tags["deme.cached"] for child in children} == {"true"}


def test_a_killed_flow_is_crashed_and_the_next_run_goes_on(
    platform: Platform, full_report: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    longer = write_recipe(finetune={"num_steps": 150, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 10})
    flow_run = platform.start(longer)
    engine = platform.wait_for_work(flow_run, "finetune segment 1 [500, 1000)")
    family = [engine, *engine.children(recursive=True)]
    time.sleep(1.0)
    engine.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(family, timeout=15)
    assert not left, "workers outlive their flow"
    assert platform.wait(flow_run, lambda state: state["type"] in FINAL)["type"] == "CRASHED"
    platform.prefect("flow-run", "retry", flow_run)
    platform.wait(flow_run, lambda state: state["type"] not in FINAL, seconds=30)
    assert platform.wait(flow_run, lambda state: state["type"] in FINAL)["type"] == "COMPLETED"
    assert platform.report(longer)["merged"]["digest"] != full_report["merged"]["digest"]


def test_cancelling_ends_every_process_within_half_a_minute(platform: Platform, write_recipe: WriteRecipe) -> None:
    endless = write_recipe(finetune={"num_steps": 100_000, "batch_size": 8, "learning_rate": 1e-3})
    flow_run = platform.start(endless)
    engine = platform.wait_for_work(flow_run, "finetune segment 0 [0, 500)")
    family = [engine, *engine.children(recursive=True)]
    platform.prefect("flow-run", "cancel", flow_run)
    _, left = psutil.wait_procs(family, timeout=30)
    assert not left
    assert platform.wait(flow_run, lambda state: state["type"] in FINAL, seconds=60)["type"] == "CANCELLED"


@pytest.mark.parametrize(
    ("recipe", "override", "sentence"),
    [
        ("no-such-recipe", "segments.count=2", "There is no recipe 'no-such-recipe'"),
        ("digits", "execution.device=cuda", "this machine shows no GPU"),
    ],
)
def test_bad_parameters_fail_with_a_sentence(platform: Platform, recipe: str, override: str, sentence: str) -> None:
    state = platform.wait(platform.start(recipe, override), lambda state: state["type"] in FINAL)
    assert state["type"] == "FAILED"
    assert sentence in state["message"]


def test_a_service_that_died_is_told_and_started_again(platform: Platform) -> None:
    before = json.loads(platform.deme.run("status", "--json").stdout)
    for process in psutil.Process(before["mlflow"]["pid"]).children(recursive=True):
        process.kill()
    os.kill(before["mlflow"]["pid"], signal.SIGKILL)
    told = platform.deme.run("status", "--json")
    assert told.returncode == 1
    assert json.loads(told.stdout)["mlflow"]["state"] == "died"
    assert platform.deme.run("up").returncode == 0
    after = json.loads(platform.deme.run("status", "--json").stdout)
    assert after["mlflow"]["state"] == "ready"
    assert after["prefect"] == before["prefect"]
    assert after["mlflow"]["url"] == before["mlflow"]["url"]


def test_a_taken_port_is_said_and_nothing_stays_behind(fresh_deme: CommandLine, platform: Platform) -> None:
    taken = platform.variables["MLFLOW_TRACKING_URI"].rpartition(":")[2]
    done = fresh_deme.run("up", "--mlflow-port", taken)
    assert done.returncode == 2
    assert f"Port {taken} for mlflow is taken by" in done.stderr
    assert not [p for p in psutil.process_iter() if _belongs(p, fresh_deme.home)]
