"""Runs that are looked up by the beginning of their id: those that do not serve are told from those that are not."""

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deme_core.errors import InputError
from deme_core.settings import Settings
from tasks.databases import start_from_copy
from tasks.tracked_runs import find_page, find_report, find_tag

MERGED, DISTILLED = "deme.merged.uri", "deme.distilled.uri"
WHOLE = {"deme.fingerprint": "f", MERGED: "s3://deme/merged/1", "deme.report.uri": "s3://deme/report/1"}
EVALUATED = {"deme.fingerprint": "f", "deme.model": "a/model"}


class Runs:
    """An MLflow database to which runs are added."""

    def __init__(self, path: Path) -> None:
        start_from_copy("mlflow", path)
        self.settings = Settings.model_validate({"MLFLOW_TRACKING_URI": f"sqlite:///{path}"})
        self._client = MlflowClient(self.settings.tracking_uri)
        self._experiment = self._client.create_experiment("toy")

    def add(self, tags: dict[str, str], status: str = "FINISHED") -> str:
        run_id = str(self._client.create_run(self._experiment, tags=tags).info.run_id)
        if status != "RUNNING":
            self._client.set_terminated(run_id, status)
        return run_id


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


def refusal(runs: Runs, run: str, tag: str = MERGED) -> str:
    with pytest.raises(InputError) as caught:
        find_tag(runs.settings, tag, run)
    return str(caught.value)


def test_a_run_is_found_by_the_beginning_of_its_id(runs: Runs) -> None:
    whole = runs.add(WHOLE | {DISTILLED: "s3://deme/distilled/1"})
    assert find_tag(runs.settings, MERGED, whole[:12]) == "s3://deme/merged/1"
    assert find_tag(runs.settings, DISTILLED, whole) == "s3://deme/distilled/1"
    assert find_page(runs.settings, whole) == (whole, "s3://deme/report/1")


def test_the_newest_run_is_found_where_none_is_named(runs: Runs) -> None:
    for uri in ("s3://deme/merged/older", "s3://deme/merged/newest"):
        time.sleep(0.002)  # MLflow's clock has milliseconds.
        runs.add(WHOLE | {MERGED: uri})
    assert find_tag(runs.settings, MERGED, None) == "s3://deme/merged/newest"


def test_a_run_without_a_distillation_is_named(runs: Runs) -> None:
    whole = runs.add(WHOLE)
    assert refusal(runs, whole[:12], DISTILLED) == (
        f"Run {whole} has no distilled model, since its recipe does not distill; leave out --row distilled."
    )


def test_a_run_that_evaluated_or_pretrained_a_model_is_named(runs: Runs) -> None:
    evaluated, pretrained = runs.add(EVALUATED), runs.add({})
    made = "give the id of a run that `deme run` made."
    for tag in (MERGED, DISTILLED):
        assert refusal(runs, evaluated, tag) == f"Run {evaluated} evaluated a model and made none; {made}"
    assert refusal(runs, pretrained[:20]) == f"Run {pretrained} made a pretrained model and no more; {made}"


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_a_run_that_has_not_finished_is_named(runs: Runs, status: str) -> None:
    run = runs.add({}, status)
    sentence = (
        f"Run {run} has not finished; wait for it, or run the same command again if it was interrupted or failed."
    )
    assert refusal(runs, run[:12]) == sentence
    for find in (find_page, lambda settings, run: find_report(settings, run=run)):
        with pytest.raises(InputError) as caught:
            find(runs.settings, run)
        assert str(caught.value) == sentence


def test_a_part_of_a_run_names_the_whole(runs: Runs) -> None:
    whole = runs.add(WHOLE)
    part = runs.add({"mlflow.parentRunId": whole})
    assert refusal(runs, part) == f"Run {part} is a part of run {whole}; give the id of that one."


def test_a_run_that_is_not_there_and_an_id_of_several_are_told_as_such(runs: Runs) -> None:
    assert refusal(runs, "nowhere").startswith("There is no run whose id begins with 'nowhere' in ")
    evaluated = [runs.add(EVALUATED) for _ in range(17)]  # Of which two begin alike: ids are hexadecimal.
    first = next(run[0] for run in evaluated if sum(other[0] == run[0] for other in evaluated) > 1)
    assert refusal(runs, first, "deme.nothing").endswith(
        f"runs have an id that begins with '{first}'; give more of it."
    )
