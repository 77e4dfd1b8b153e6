"""MLflow goes away in mid-training: the training goes on, and its metrics arrive afterwards, each once."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from deme_core.artifacts import ArtifactStore
from deme_core.settings import Settings
from deme_core.store import open_store
from flows.stack.processes import stop_tree
from tasks import patient_client, training_log
from tasks.databases import start_from_copy
from tasks.tracking import Tracker
from tasks.training_log import TrainingLog
from tasks.work.base import execute
from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import WriteRecipe, write_recipe
from tests.e2e.waiting import wait_for
from tests.fault_proxy import FaultProxy
from tests.integration.conftest import free_ports
from tests.small_run import contents, finetune_job, make_context, pretrain_job

__all__ = ["write_recipe"]

pytestmark = pytest.mark.timeout(280)
NAMES = ("loss/diffusion", "loss/consistency", "lr", "grad_norm", "images_per_sec", "gpu_memory_gb")


class Server:
    """An MLflow server that can be killed and started again on the same port and database."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        start_from_copy("mlflow", folder / "mlflow.db")

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        wait_for(self._answers, timeout_sec=60)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2, trust_env=False).is_success
        except httpx.HTTPError:
            time.sleep(0.1)
            return False

    def kill(self) -> None:
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=10)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("mlflow"))
    found.start()
    yield found
    stop_tree(psutil.Process(found.process.pid), seconds=10)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of minutes."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr(training_log, "_SECONDS_BETWEEN_RECORDS", 0.2)
    monkeypatch.setattr(patient_client, "_POLL_SEC", 0.2)


@contextmanager
def _tracker(url: str, home: Path, name: str) -> Iterator[tuple[Tracker, str]]:
    settings = Settings.model_validate({"DEME_HOME": home, "MLFLOW_TRACKING_URI": url})
    tracker = Tracker(settings, experiment=name, run_name=name, flow_run_id="flow")
    yield tracker, tracker.child("finetune/all")


def _history(server: Server, run_id: str) -> dict[str, list[tuple[int, float]]]:
    client = MlflowClient(server.url)
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in NAMES}


def _check(server: Server, run_id: str, history: list[dict[str, Any]]) -> None:
    keys = ("diffusion_loss", "consistency_loss", "learning_rate", "grad_norm", "images_per_sec", "gpu_memory_gb")
    told = _history(server, run_id)
    for name, key in zip(NAMES, keys, strict=True):
        assert sorted(told[name]) == [(r["global_step"], pytest.approx(r[key])) for r in history], name


def test_a_training_goes_on_and_its_metrics_arrive_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(tmp_path)
    pretrained = execute(pretrain_job(), context, lambda _: None)
    job = finetune_job(pretrained, 0, num_steps=600, checkpoint_every=10_000)
    with _tracker(server.url, tmp_path, "away") as (tracker, run_id):
        log, came = TrainingLog(lambda: (tracker, run_id)), list[tuple[int, float]]()

        def take(record: dict[str, Any]) -> None:
            before = time.monotonic()
            if record["global_step"] == 100:
                wait_for(lambda: _history(server, run_id)["lr"])  # Some has arrived before.
                server.kill()
                before = time.monotonic()
            log.add(record)
            came.append((record["global_step"], time.monotonic() - before))

        result = execute(job, context, take)
        # It is still away: all of the training went on without it.
        assert [step for step, _ in came] == list(range(10, 601, 10))
        assert max(seconds for _, seconds in came) < 0.5
        assert server.process.poll() is not None
        server.start()
        log.complete(result.metrics["history"])
        _check(server, run_id, result.metrics["history"])
        tracker.finish(run_id)
    assert f"finetune/{result.ref.digest}" in contents(context.artifacts)


@dataclass(frozen=True)
class TrackedCommandLine(CommandLine):
    """The ``deme`` command, with its runs on an MLflow server."""

    server: str = ""

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"MLFLOW_TRACKING_URI": self.server}


@pytest.mark.timeout(1500)
def test_a_run_goes_on_through_a_minute_without_mlflow(
    server: Server, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    # The control's twice as many take two minutes on two cores.
    steps = {"num_steps": 700, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 10_000}
    recipe = write_recipe(name="minute", finetune=steps)
    run = TrackedCommandLine(tmp_path, server=server.url).start("run", recipe)
    try:
        wait_for(lambda: _child_runs(server, "minute", "finetune/all"), timeout_sec=500)
        (control,) = _child_runs(server, "minute", "finetune/all")
        wait_for(lambda: _history(server, control)["lr"])
        server.kill()
        time.sleep(60)
        server.start()
        assert run.wait(timeout=600) == 0
    finally:
        run.kill()
        run.wait()
    artifacts = ArtifactStore(open_store((tmp_path / "store").as_uri()), tmp_path / "cache")
    histories = [artifacts.manifest(ref).metrics["history"] for ref in artifacts.list_refs("finetune")]
    (expected,) = [history for history in histories if history[-1]["global_step"] == 2 * steps["num_steps"]]
    _check(server, control, expected)
    client = MlflowClient(server.url)
    times = sorted(metric.timestamp for metric in client.get_metric_history(control, "lr"))
    assert max(after - before for before, after in pairwise(times)) < 30_000, "the training waited for MLflow"
    found = client.search_runs([client.get_experiment_by_name("minute").experiment_id])
    assert {each.info.status for each in found} == {"FINISHED"}


def _child_runs(server: Server, experiment: str, name: str) -> list[str]:
    client = MlflowClient(server.url)
    if (found := client.get_experiment_by_name(experiment)) is None:
        return []
    return [run.info.run_id for run in client.search_runs([found.experiment_id]) if run.info.run_name == name]


@pytest.mark.parametrize("kind", ["lost answer", "cut", "InternalError", "ServiceUnavailable"])
def test_a_faulty_way_to_mlflow_doubles_nothing(
    server: Server, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [_record(step) for step in range(10, 310, 10)]
    with FaultProxy(server.url) as proxy, _tracker(proxy.url, tmp_path, kind) as (tracker, run_id):
        count = 0

        def two_of_three(method: str, path: str) -> bool:
            nonlocal count
            if path.endswith("runs/log-batch"):
                count += 1
                return count % 3 != 0
            return False

        committed = proxy.plan(kind, two_of_three, times=10**6)
        log = TrainingLog(lambda: (tracker, run_id))
        for record in history:
            log.add(record)
            time.sleep(0.02)
        log.complete(history)
        tracker.log_params(run_id, {"low": 0})
        tracker.set_tags(run_id, {"a": "b"})
        tracker.finish(run_id)
    assert len(committed) >= 4
    _check(server, run_id, history)
    found = MlflowClient(server.url).get_run(run_id)
    assert (found.info.status, found.data.params, found.data.tags["a"]) == ("FINISHED", {"low": "0"}, "b")


def _record(step: int) -> dict[str, Any]:
    return {
        "global_step": step,
        "diffusion_loss": 1 / step,
        "consistency_loss": 0.0,
        "learning_rate": 1e-3,
        "grad_norm": float(step),
        "images_per_sec": 3.5,
        "gpu_memory_gb": 0.0,
    }
