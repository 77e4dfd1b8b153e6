"""`kill -9` of each service in the middle of a run, and of all of them: `make test-faults`, some ten minutes.

Each time: what is whole stays, nothing is Running for ever, and the next run ends with the very weights of an
undisturbed one, and takes what was done from the store. A run that has lost MLflow alone ends as if nothing had been.
"""

import signal
import time
from collections.abc import Iterator
from typing import Any

import boto3
import psutil
import pytest
from mlflow import MlflowClient

from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import WriteRecipe, platform, write_recipe
from tests.e2e.stack_platform import FINAL, Platform, belongs

__all__ = ["platform", "write_recipe"]

pytestmark = pytest.mark.timeout(900)
_TASK = "finetune segment 1 [500, 1000)"
# The runs in MLflow of tasks that may be done before.
_CHILDREN = {
    "pretrained model": "pretrain",
    "finetune segment 0 [0, 500)": "finetune/segment-0",
    "finetune all timesteps": "finetune/all",
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """A state folder of its own, in which the same recipes run without faults."""
    yield CommandLine(tmp_path_factory.mktemp("undisturbed"))


def _recipe(write_recipe: WriteRecipe, seed: int) -> str:
    finetune = {"num_steps": 150, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 25, "seed": seed}
    return write_recipe(finetune=finetune)


def _kill(victim: str, process: psutil.Process) -> None:
    # Servers are families; a worker's and a flow's children must be able to lose their parent.
    children = [] if victim in ("worker", "flow") else process.children(recursive=True)
    for member in (process, *children):
        member.send_signal(signal.SIGKILL)
    psutil.wait_procs([process, *children], timeout=10)


@pytest.mark.parametrize(
    ("seed", "victims"),
    [
        (101, ["mlflow"]),
        (102, ["s3"]),
        (103, ["prefect"]),
        (104, ["worker"]),
        (105, ["worker", "flow"]),
        (106, ["worker", "flow", "mlflow", "prefect", "s3"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_what_is_killed_loses_nothing(
    platform: Platform, undisturbed: CommandLine, write_recipe: WriteRecipe, seed: int, victims: list[str]
) -> None:
    recipe = _recipe(write_recipe, seed)
    expected = undisturbed.report("run", recipe)
    flow_run = platform.start(recipe)
    engine = platform.wait_for_work(flow_run, _TASK)
    done = [name for name, state in platform.tasks(flow_run).items() if state == "COMPLETED"]
    doomed = {name: engine if name == "flow" else psutil.Process(platform.pid(name)) for name in victims}
    for name, process in doomed.items():
        _kill(name, process)

    time.sleep(5)
    assert platform.deme.run("up").returncode == 0
    # Two minutes without heartbeat, and what a server that has just started needs to notice.
    state = platform.wait(flow_run, lambda state: state["type"] in FINAL, seconds=400)
    assert state["type"] in (("COMPLETED",) if victims == ["mlflow"] else ("COMPLETED", "FAILED", "CRASHED")), state
    report = platform.report(recipe)
    assert report["merged"]["weights_digest"] == expected["merged"]["weights_digest"]
    assert report["rows"] == expected["rows"]
    assert _orphans(flow_run, platform) == []
    cached = _cached(report, platform)
    assert "pretrained model" in done
    assert {cached[_CHILDREN[name]] for name in done if name in _CHILDREN} == {True}
    assert all(cached.values()) or state["type"] != "COMPLETED"


def test_a_killed_flow_is_crashed_and_a_retry_goes_on(platform: Platform, write_recipe: WriteRecipe) -> None:
    longer = write_recipe(finetune={"num_steps": 100, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 10})
    flow_run = platform.start(longer)
    engine = platform.wait_for_work(flow_run, "finetune segment 1 [500, 1000)")
    family = [engine, *engine.children(recursive=True)]
    engine.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(family, timeout=15)
    assert not left, "workers outlive their flow"
    assert platform.wait(flow_run, lambda state: state["type"] in FINAL)["type"] == "CRASHED"
    time.sleep(10)  # Prefect's worker reports the crash again, five seconds later: a retry before that is lost.
    platform.prefect("flow-run", "retry", flow_run)
    platform.wait(flow_run, lambda state: state["type"] not in FINAL, seconds=30)
    assert platform.wait(flow_run, lambda state: state["type"] in FINAL)["type"] == "COMPLETED"


def test_a_worker_that_is_stopped_lets_its_trainings_leave_a_checkpoint(
    platform: Platform, write_recipe: WriteRecipe
) -> None:
    finetune = {"num_steps": 100_000, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 50_000, "seed": 108}
    flow_run = platform.start(write_recipe(finetune=finetune))
    engine = platform.wait_for_work(flow_run, "finetune segment 0 [0, 500)")
    time.sleep(10)
    began, worker = time.monotonic(), psutil.Process(platform.pid("worker"))
    worker.terminate()
    _, left = psutil.wait_procs([worker, engine], timeout=45)
    assert not left
    assert time.monotonic() - began > 1, "its flow runs were killed"
    state = platform.state(flow_run)
    assert (state["type"], state["message"]) == ("CRASHED", "Execution was aborted by a termination signal.")
    assert any("/step-" in key and key.endswith("/manifest.json") for key in _checkpoints(platform))
    assert platform.deme.run("up").returncode == 0


def test_a_look_that_was_beginning_when_all_was_killed_holds_up_no_other(platform: Platform) -> None:
    doomed = platform.start_deployment("deme-watch/new-checkpoints")
    deadline = time.monotonic() + 60
    while platform.state(doomed)["type"] == "SCHEDULED":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert platform.state(doomed)["type"] == "PENDING"
    everything = [process for process in psutil.process_iter() if belongs(process, platform.deme.home)]
    for process in everything:
        process.kill()
    psutil.wait_procs(everything, timeout=15)
    told = platform.deme.run("up")
    assert "never began" in " ".join(told.stdout.split())
    assert platform.state(doomed)["type"] == "CRASHED"
    next_look = platform.start_deployment("deme-watch/new-checkpoints")
    assert platform.wait(next_look, lambda state: state["type"] in FINAL)["type"] == "COMPLETED"


def _checkpoints(platform: Platform) -> list[str]:
    store = boto3.client(
        "s3",
        endpoint_url=platform.variables["AWS_ENDPOINT_URL"],
        aws_access_key_id=platform.variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=platform.variables["AWS_SECRET_ACCESS_KEY"],
        region_name=platform.variables["AWS_DEFAULT_REGION"],
    )
    listed = store.list_objects_v2(Bucket="deme", Prefix="store/checkpoints/")
    return [found["Key"] for found in listed.get("Contents", ())]


def _cached(report: dict[str, Any], platform: Platform) -> dict[str, bool]:
    """Returns of each run below a flow's run in MLflow whether it came from the store."""
    client = MlflowClient(platform.variables["MLFLOW_TRACKING_URI"])
    below = f"tags.mlflow.parentRunId = '{report['mlflow_run_id']}'"
    runs = client.search_runs([platform.experiment("toy")], below)
    return {run.info.run_name: run.data.tags["deme.cached"] == "true" for run in runs}


def _orphans(flow_run: str, platform: Platform) -> list[Any]:
    return [process for process in platform.processes(flow_run) if process.is_running()]
