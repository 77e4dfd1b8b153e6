"""A machine that is taken away: SIGTERM, and SIGKILL thirty seconds later."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deme_core.errors import DemeError, RunEndedError, WorkerStoppedError
from tasks.jobs import FinetuneJob, JobResult
from tasks.slots import Slot
from tasks.worker_pool import WorkerPool
from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import TOY_RECIPE, WriteRecipe, write_recipe
from tests.e2e.waiting import wait_for
from tests.small_run import contents, finetune_job, make_context, pretrain_job

__all__ = ["write_recipe"]

GRACE_SEC = 30.0
NUM_STEPS = 1000
pytestmark = pytest.mark.timeout(280)


class Training:
    """A long finetuning in a pool of one worker process."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEME_HOME", str(home))
        monkeypatch.delenv("DEME_STORE_URI", raising=False)
        self.records: list[dict[str, Any]] = []
        self.pool = WorkerPool([Slot("cpu", None, 1)])
        self.artifacts = make_context(home).artifacts

    def job(self, pretrained: JobResult) -> FinetuneJob:
        # Checkpoints of its own would be made at steps 0, 10000, …: never.
        return finetune_job(pretrained, 0, num_steps=NUM_STEPS, checkpoint_every=10_000)

    def run(self) -> JobResult:
        pretrained = self.pool.run(pretrain_job(), self.records.append)
        return self.pool.run(self.job(pretrained), self.records.append)

    def is_under_way(self) -> bool:
        return any(record.get("num_steps") == NUM_STEPS and record["global_step"] >= 20 for record in self.records)

    @property
    def worker(self) -> psutil.Process:
        (found,) = [p for p in psutil.Process().children() if "tasks.worker" in " ".join(p.cmdline())]
        return found

    def checkpoints(self) -> list[str]:
        keys = (item.key.split("/") for item in self.artifacts.store.list("checkpoints/"))
        return [step for _, _, step, name in (key for key in keys if len(key) == 4) if name == "manifest.json"]


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    found = Training(tmp_path / "home", monkeypatch)
    yield found
    found.pool.close()


def _interrupted(training: Training, interrupt: Callable[[], object], error: type[DemeError]) -> tuple[int, float]:
    """Interrupts a training; returns the last step that was heard of, and the seconds in which the process left."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            training.run()
        except DemeError as caught:
            raised.append(caught)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_for(training.is_under_way)
    worker, began = training.worker, time.monotonic()
    interrupt()
    worker.wait(GRACE_SEC)
    seconds = time.monotonic() - began
    thread.join(10)
    assert type(raised[0]) is error, raised
    steps = [record["global_step"] for record in training.records if record.get("num_steps") == NUM_STEPS]
    return steps[-1], seconds


def _finish(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Resumes at that very step, and ends with the weights of an undisturbed training."""
    training.pool, training.records = WorkerPool([Slot("cpu", None, 1)]), []
    result = training.run()
    training.pool.close()
    assert {"message": f"resumed at step {step}"} in training.records
    assert training.checkpoints() == []
    monkeypatch.setenv("DEME_HOME", str(tmp_path / "undisturbed"))
    undisturbed = Training(tmp_path / "undisturbed", monkeypatch)
    expected = undisturbed.run()
    undisturbed.pool.close()
    name = f"finetune/{expected.ref.digest}"
    assert contents(training.artifacts)[name] == contents(undisturbed.artifacts)[name]
    assert result.ref.digest == expected.ref.digest


def test_a_worker_that_gets_sigterm_leaves_a_checkpoint_of_that_step(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seconds = _interrupted(training, lambda: training.worker.send_signal(signal.SIGTERM), WorkerStoppedError)
    assert seconds < GRACE_SEC
    assert training.checkpoints() == [f"step-{step:08d}"]
    _finish(training, tmp_path, monkeypatch, step)


def test_a_pool_that_is_closed_leaves_a_checkpoint(training: Training) -> None:
    step, seconds = _interrupted(training, training.pool.close, RunEndedError)
    assert seconds < GRACE_SEC
    assert training.checkpoints() == [f"step-{step:08d}"]


def test_sigterm_to_a_run_ends_it_in_time_and_the_next_one_goes_on(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    deme = CommandLine(tmp_path / "home")
    finetune = {"num_steps": 160, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 40}
    recipe = write_recipe(finetune=finetune, execution={"num_workers": 2, "device": "cpu"})
    run = deme.start("run", recipe)
    try:
        wait_for(lambda: any(deme.home.glob("store/checkpoints/*/step-00000040/manifest.json")))
        family = psutil.Process(run.pid).children(recursive=True)
        time.sleep(0.2)
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        run.wait(GRACE_SEC)
        assert time.monotonic() - began < GRACE_SEC
    finally:
        run.kill()
        run.wait()
    _, left = psutil.wait_procs(family, timeout=5)
    assert not left, "its workers and Prefect's temporary server end with it"
    steps = [int(p.parent.name[5:]) for p in deme.home.glob("store/checkpoints/*/step-*/manifest.json")]
    assert [step for step in steps if step % 40], "none but those that were due"
    report = deme.report("run", recipe)
    expected = CommandLine(tmp_path / "undisturbed").report("run", recipe)
    assert report["merged"]["weights_digest"] == expected["merged"]["weights_digest"]
    assert report["rows"] == expected["rows"]


def test_ctrl_c_ends_a_run_in_time_with_a_checkpoint(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    """The terminal sends it to the workers, too."""
    deme = CommandLine(tmp_path / "home")
    training = {"num_steps": 5000, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 40}
    pretrained = TOY_RECIPE["pretrained"] | {"training": training}
    command = [*deme.command, "pretrain", write_recipe(pretrained=pretrained)]
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(command, env=deme.environment, stdout=said, stderr=said, start_new_session=True)
    try:
        wait_for(lambda: any(deme.home.glob("store/checkpoints/*/step-00000040/manifest.json")))
        time.sleep(0.2)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(GRACE_SEC) == 130
    finally:
        run.kill()
        run.wait()
    steps = [int(p.parent.name[5:]) for p in deme.home.glob("store/checkpoints/*/step-*/manifest.json")]
    assert [step for step in steps if step % 40], steps
    assert "run the same command again to go on" in (tmp_path / "said").read_text()


def test_what_is_no_training_is_dropped_at_once(training: Training) -> None:
    training.pool.start()
    worker = training.worker
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(GRACE_SEC) is not None
    # The next job gets a fresh process.
    assert training.pool.run(pretrain_job(), training.records.append).metrics["num_train_timesteps"] == 1000


def test_a_listener_that_fails_ends_the_process_of_its_job(training: Training) -> None:
    """Else the next job would read what is left of the answer."""

    class ListenerError(Exception):
        pass

    def fail(record: dict[str, Any]) -> None:
        raise ListenerError

    with pytest.raises(ListenerError):
        training.pool.run(pretrain_job(), fail)
    pretrained = training.pool.run(pretrain_job(), training.records.append)
    assert pretrained.ref.stage == "pretrained"
    copy = training.pool.run(finetune_job(pretrained, 500), training.records.append)
    assert copy.ref.stage == "finetune"
