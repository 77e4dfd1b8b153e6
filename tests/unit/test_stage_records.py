"""What the Prefect tasks of stages tell MLflow: of which timestep, which candidate, which seed a number is."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from deme_core.manifest import ArtifactRef
from deme_core.recipe_file import load_recipe
from tasks import stages
from tasks.jobs import GeneratedImages, JobResult
from tasks.stages import _candidate_metrics


def test_a_held_out_loss_is_logged_at_the_lowest_timestep_of_its_bin(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[int, Any] = {}
    tracker = SimpleNamespace(
        child=lambda name: name, log_steps=lambda _, steps: logged.update(steps), finish=lambda _: None
    )
    result = SimpleNamespace(metrics={"bins": [0.3, 0.1]})
    runtime = SimpleNamespace(tracker=tracker, recipe=load_recipe("digits"), run=lambda *_, **__: result)
    monkeypatch.setattr(stages, "current_runtime", lambda: runtime)
    stages.heldout_loss.fn(ArtifactRef("file:///store/merged/a", "a"), (0, 500, 1000), "merged")
    assert logged == {0: {"heldout_loss": 0.3}, 500: {"heldout_loss": 0.1}}


@pytest.mark.parametrize(("rough", "name"), [(False, "score"), (True, "rough_score")])
def test_rough_scores_of_a_search_are_logged_apart(rough: bool, name: str) -> None:
    assert _candidate_metrics({"weights": [0.5], "score": 3.0, "rough": rough}) == {"weight/0": 0.5, name: 3.0}


def test_each_seed_is_scored_by_its_own_features(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []
    logged: dict[int, Any] = {}
    tracker = SimpleNamespace(child=lambda name: name, log_params=lambda *_: None, finish=lambda _: None)
    tracker.log_steps = lambda _, steps: logged.update(steps)

    def run(job: Any, **_: Any) -> Any:
        jobs.append(job)
        return SimpleNamespace(metrics={"scores": {"fid": float(job.features[0].digest)}})

    runtime = SimpleNamespace(
        tracker=tracker,
        recipe=load_recipe("digits"),
        run=run,
        ended_by_failure=nullcontext,
        note_results=lambda *_: None,
    )
    monkeypatch.setattr(stages, "current_runtime", lambda: runtime)
    refs = [ArtifactRef(f"file:///store/features/{seed}", str(seed)) for seed in (4, 5)]
    images = [GeneratedImages(models=(refs[0],), edges=None, seed=seed) for seed in (4, 5)]
    stages.evaluate_row.fn("merged", images, [[JobResult(ref, {}, True, 0.0, 0.0)] for ref in refs], refs[0])
    assert [job.images.seed for job in jobs] == [4, 5]
    assert logged == {4: {"fid": 4.0}, 5: {"fid": 5.0}}
