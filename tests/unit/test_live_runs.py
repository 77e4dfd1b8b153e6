from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from deme_core.recipe_file import load_recipe
from deme_core.settings import Settings
from flows.flow_runtime import _open_tracker
from tasks.databases import start_from_copy
from tasks.live_runs import killed_runs, live_run
from tasks.mlflow_client import mlflow_client
from tasks.tracking import Tracker
from tests.killed_run import leave_a_killed_run


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    start_from_copy("mlflow", tmp_path / "mlflow.db")
    return Settings.model_validate({"DEME_HOME": str(tmp_path)})


def test_a_run_that_lives_or_has_ended_is_not_killed(settings: Settings) -> None:
    with live_run(settings, "0-live"):
        assert list(killed_runs(settings)) == []
    with pytest.raises(ZeroDivisionError), live_run(settings, "1-failed"):
        raise ZeroDivisionError
    assert list(killed_runs(settings)) == []
    assert list((settings.state_folder / "live-runs").iterdir()) == []


def test_a_killed_run_is_told_once(settings: Settings) -> None:
    leave_a_killed_run(settings, "0-killed")
    with live_run(settings, "1-live"):
        assert list(killed_runs(settings)) == ["0-killed"]
        assert list(killed_runs(settings)) == []


def test_a_killed_run_is_told_again_if_mlflow_was_away(settings: Settings) -> None:
    leave_a_killed_run(settings, "0-killed")
    with pytest.raises(ConnectionError):
        for _ in killed_runs(settings):
            raise ConnectionError
    assert list(killed_runs(settings)) == ["0-killed"]


def test_a_run_that_was_tracked_elsewhere_waits_for_that(settings: Settings) -> None:
    leave_a_killed_run(settings, "0-killed")
    elsewhere = settings.model_copy(update={"tracking_uri_override": "sqlite:///elsewhere.db"})
    assert list(killed_runs(elsewhere)) == []
    assert list(killed_runs(settings)) == ["0-killed"]


def test_a_run_that_was_killed_and_goes_on_lives(settings: Settings) -> None:
    leave_a_killed_run(settings, "flow")
    with live_run(settings, "flow"):
        assert list(killed_runs(settings)) == []


def test_mlflow_hears_of_what_was_killed_and_of_nothing_else(settings: Settings) -> None:
    killed = Tracker(settings, experiment="one", run_name="one", flow_run_id="killed")
    at_work, done = killed.child("finetune/0"), killed.child("finetune/1")
    killed.finish(done)
    live = Tracker(settings, experiment="two", run_name="two", flow_run_id="live")
    live_child = live.child("finetune/0")
    live.end_killed("killed")
    assert _statuses(settings, killed.run_id, at_work, done) == ["KILLED", "KILLED", "FINISHED"]
    assert _statuses(settings, live.run_id, live_child) == ["RUNNING", "RUNNING"]


@pytest.mark.parametrize(("status", "rest"), [("FINISHED", "KILLED"), ("FAILED", "FAILED"), ("KILLED", "KILLED")])
def test_a_flow_ends_with_all_its_runs(settings: Settings, status: Any, rest: str) -> None:
    before = Tracker(settings, experiment="one", run_name="one", flow_run_id="flow")
    child_before = before.child("heldout/pretrained")
    tracker = Tracker(settings, experiment="one", run_name="one", flow_run_id="flow")
    at_work = tracker.child("heldout/pretrained")
    tracker.finish_flow(status)
    assert _statuses(settings, tracker.run_id, at_work) == [status, rest]
    assert _statuses(settings, before.run_id, child_before) == ["KILLED", "KILLED"]


def test_a_run_begins_though_mlflow_does_not_take_the_end_of_another(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MlflowException("not yours")

    leave_a_killed_run(settings, "killed")
    monkeypatch.setattr(Tracker, "end_killed", refuse)
    tracker = _open_tracker(settings, load_recipe("digits"), "mine").result(timeout=120)
    assert _statuses(settings, tracker.run_id) == ["RUNNING"]
    assert list(killed_runs(settings)) == ["killed"], "the next run tries again"


def _statuses(settings: Settings, *runs: str) -> list[str]:
    return [mlflow_client(settings).get_run(run).info.status for run in runs]
