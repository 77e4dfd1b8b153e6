"""What a real MLflow holds: versions and aliases, and runs that ended too early."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from deme_core.errors import InputError
from deme_core.settings import Settings
from deme_core.verdict import RowScores
from tasks.registry import register
from tasks.tracked_runs import find_report
from tasks.tracking import Tracker

METRIC = "fd_efficientnet_lite0"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    return Settings(MLFLOW_TRACKING_URI=f"sqlite:///{path}")  # type: ignore[call-arg]


def report(recipe: str, digest: str, *, verdict: str = "better", **other: Any) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "fingerprint": "f",
        "mlflow_run_id": None,
        "merged": {"digest": digest, "uri": f"s3://deme/store/merged/{digest}", "weights": [0.5]},
        "verdict": {"vs_pretrained": verdict},
        **other,
    }


def champion(settings: Settings, name: str) -> str | None:
    version = dict(MlflowClient(settings.tracking_uri).get_registered_model(name).aliases).get("champion")
    return None if version is None else str(version)


def test_a_champion_must_be_beaten_beyond_the_interval(settings: Settings, tmp_path: Path) -> None:
    def run(digest: str, scores: list[float], spread: float = 0.1, **other: Any) -> Any:
        resampled = [[score - spread, score, score + spread] for score in scores]
        row = RowScores(scores, [resampled[0], resampled[1][::-1], resampled[2]])
        return register(settings, report("race", digest, **other), row, source=tmp_path.as_uri(), metric=METRIC)

    first = run("a", [30.0, 31.0, 32.0])
    assert (first.version, first.decision) == ("1", "promoted")
    near = run("b", [29.0, 31.5, 31.9])
    assert (near.version, near.decision) == ("2", "kept")
    assert "too close to call" in near.reason
    assert champion(settings, "deme-race") == "1"
    of_few_images = run("e", [20.0, 21.0, 22.1], spread=90.0)
    assert of_few_images.decision == "kept", "the interval over images holds too"
    better = run("c", [20.0, 21.0, 22.1])
    assert (better.version, better.decision) == ("4", "promoted")
    assert champion(settings, "deme-race") == "4"
    without = register(
        settings, report("race", "f"), RowScores([1.0, 2.0, 3.1]), source=tmp_path.as_uri(), metric=METRIC
    )
    assert without.decision == "kept"
    assert "too close to call" in without.reason
    assert "only one of the two has resamples" in without.reason
    other_terms = run("d", [1.0, 1.1, 1.2], fingerprint="g")
    assert other_terms.decision == "kept"
    assert "cannot be compared" in other_terms.reason
    assert run("c", [20.0, 21.0, 22.1], fingerprint="g").version == "7", "under other conditions it is another version"
    again = run("c", [20.0, 21.0, 22.1])
    assert (again.version, again.decision) == ("4", "promoted")

    client = MlflowClient(settings.tracking_uri)
    assert client.get_model_version_by_alias("deme-race", "challenger").version in ("4", 4)
    tags = client.get_model_version("deme-race", "2").tags
    assert tags["deme.decision"] == "kept"
    assert tags["deme.reason"] == near.reason


def test_more_resamples_than_mlflow_takes_leave_the_first_ones(settings: Settings, tmp_path: Path) -> None:
    many = [[30 + seed + resample / 1e7 for resample in range(3000)] for seed in range(3)]
    found = register(settings, report("many", "a"), RowScores([30.0, 31.0, 32.0], many), source="s3://a", metric=METRIC)
    assert (found.version, found.decision) == ("1", "promoted")
    kept = json.loads(MlflowClient(settings.tracking_uri).get_model_version("deme-many", "1").tags["deme.replicates"])
    assert 1000 < len(kept[0]) < 3000
    assert kept == [seed[: len(kept[0])] for seed in many]


def test_where_higher_is_better_the_higher_scores_win(settings: Settings, tmp_path: Path) -> None:
    def decision(digest: str, *scores: float) -> str:
        row = RowScores(list(scores))
        content = report("prompted", digest)
        return register(settings, content, row, source=tmp_path.as_uri(), metric="clip_score").decision

    assert decision("a", 25.0, 26.0, 27.0) == "promoted"
    assert decision("lower", 20.0, 21.0, 22.1) == "kept"
    assert decision("higher", 30.0, 31.0, 32.1) == "promoted"


def test_the_first_champion_must_beat_its_pretrained_model(settings: Settings, tmp_path: Path) -> None:
    content = report("first", "a", verdict="too close to call")
    found = register(settings, content, RowScores([30.0, 31.0]), source=tmp_path.as_uri(), metric=METRIC)
    assert (found.version, found.decision) == ("1", "kept")
    assert champion(settings, "deme-first") is None


def test_what_another_run_wrote_at_the_same_moment_is_written_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, refused = MlflowClient.set_model_version_tag, list[str]()

    def refuse_first(client: MlflowClient, name: str, version: str, key: str, value: str) -> None:
        if key not in refused:
            refused.append(key)
            raise MlflowException("UNIQUE constraint failed: model_version_tags.name")
        write(client, name, version, key, value)

    monkeypatch.setattr(MlflowClient, "set_model_version_tag", refuse_first)
    scores = RowScores([1.0, 2.0, 3.0], [[1.0, 2.0]] * 3)
    done = register(settings, report("both", "a"), scores, source=tmp_path.as_uri(), metric=METRIC)
    assert set(refused) == {"deme.decision", "deme.reason"}
    tags = MlflowClient(settings.tracking_uri).get_model_version("deme-both", done.version).tags
    assert tags["deme.decision"] == done.decision


def test_a_run_that_ended_before_its_report_is_named(settings: Settings, tmp_path: Path) -> None:
    client = MlflowClient(settings.tracking_uri)
    experiment = client.create_experiment("cut short", artifact_location=tmp_path.as_uri())
    run = client.create_run(experiment, tags={"deme.fingerprint": "f"}).info.run_id
    with pytest.raises(InputError, match=f"{run} has no report.*run it again"):
        find_report(settings, run=run)


def test_a_recipe_whose_experiment_was_deleted_runs_again(settings: Settings) -> None:
    client = MlflowClient(settings.tracking_uri)
    Tracker(settings, experiment="tidy", run_name="first", flow_run_id="flow")
    found = client.get_experiment_by_name("tidy")
    client.delete_experiment(found.experiment_id)
    Tracker(settings, experiment="tidy", run_name="second", flow_run_id="flow")
    assert client.get_experiment_by_name("tidy").lifecycle_stage == "active"
    assert len(client.search_runs([found.experiment_id])) == 2


def test_a_champion_that_cannot_be_looked_up_is_not_replaced(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_locked(*_: Any) -> None:
        raise MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE)

    register(settings, report("locked", "a"), RowScores([3.0, 3.1, 3.2]), source=tmp_path.as_uri(), metric=METRIC)
    monkeypatch.setattr(MlflowClient, "get_model_version_by_alias", be_locked)
    with pytest.raises(MlflowException, match="locked"):
        register(settings, report("locked", "b"), RowScores([9.0, 9.1, 9.2]), source=tmp_path.as_uri(), metric=METRIC)
    assert champion(settings, "deme-locked") == "1"
