"""`kill -9` of the workers of a `deme run`, and of the run itself, without any server: the next run finishes it."""

import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from deme_core.settings import Settings
from tasks.mlflow_client import mlflow_client
from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import WriteRecipe, deme, prefect_api, write_recipe
from tests.e2e.waiting import wait_for

__all__ = ["deme", "prefect_api", "write_recipe"]

pytestmark = pytest.mark.timeout(900)
# `deme`, and what its tasks tell goes to a file.
_TELLING = """
import json, os, threading
from tasks.progress import subscribe

lock = threading.Lock()

def write(event):
    with lock, open(os.path.join(os.environ["DEME_HOME"], "told"), "a") as file:
        file.write(json.dumps([event.task, event.kind, event.record.get("message", "")]) + "\\n")

subscribe(write)
from flows.cli import main
main()
"""


@dataclass(frozen=True)
class TellingCommandLine(CommandLine):
    """The ``deme`` command, which leaves what its tasks tell."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", _TELLING]

    def take_told(self) -> list[tuple[str, str, str]]:
        """Returns task, kind and message of every event since it was last asked."""
        told = self.home / "told"
        lines = told.read_text().splitlines()
        told.unlink()
        return [tuple(json.loads(line)) for line in lines]


def test_killed_worker_and_killed_run_end_with_the_same_model(
    deme: CommandLine, write_recipe: WriteRecipe, prefect_api: Mapping[str, str], tmp_path: Path
) -> None:
    finetune = {"num_steps": 40, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 10}
    recipe = write_recipe(finetune=finetune)
    killed_deme = TellingCommandLine(tmp_path / "home", prefect_api)
    run = killed_deme.start("run", recipe)
    try:
        wait_for(lambda: any(killed_deme.home.glob("store/checkpoints/*/step-*/manifest.json")))
        killed = set(_workers_of(run.pid))
        assert killed
        for worker in killed:
            os.kill(worker, signal.SIGKILL)
        wait_for(lambda: set(_workers_of(run.pid)) - killed)  # The retries have new processes.
        wait_for(lambda: any(killed_deme.home.glob("store/finetune/*/manifest.json")))
    finally:
        orphans = _workers_of(run.pid)
        run.kill()
        run.wait()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in orphans))
    before = killed_deme.take_told()

    report, expected = killed_deme.report("run", recipe), deme.report("run", recipe)
    assert report["merged"]["weights_digest"] == expected["merged"]["weights_digest"]
    assert report["rows"] == expected["rows"]
    assert _mlflow_statuses(killed_deme) == {"FINISHED", "KILLED", "FAILED"}, "MLflow must hear of what was killed"
    left = [path for path in killed_deme.home.glob("store/checkpoints/**/*") if path.is_file()]
    assert not left, "checkpoints of finished runs must go"
    after = killed_deme.take_told()
    ends = {task: kind for task, kind, _ in after if kind in ("finished", "cached")}
    finished = {task for task, kind, _ in before if kind == "finished"}
    assert "pretrained model" in finished
    assert {ends[task] for task in finished} == {"cached"}, "nothing may be done again"
    resumed = [(task, re.fullmatch(r"resumed at step (\d+)", message)) for task, _, message in before + after]
    (training,) = {task for task, kind, _ in before if kind == "failed"}
    assert [int(step[1]) >= 10 for task, step in resumed if step and task == training] == [True]


def _mlflow_statuses(line: CommandLine) -> set[str]:
    client = mlflow_client(Settings.model_validate({"DEME_HOME": str(line.home)}))
    experiments = [str(experiment.experiment_id) for experiment in client.search_experiments()]
    return {run.info.status for run in client.search_runs(experiments)}


def _workers_of(pid: int) -> list[int]:
    return [child for child in _children_of(pid) if "tasks.worker" in _command(child)]


def _children_of(pid: int) -> list[int]:
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            children.append(int(stat.parent.name))
    return children


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""
