"""What each stage of a run cost."""

import time
from typing import get_args

import pytest

from deme_core.manifest import ArtifactRef
from deme_core.recipe import EvaluateSpec, ExecutionSpec, MethodSpec
from tasks.jobs import JOBS, GeneratedFeaturesJob, GeneratedImages, Job, JobResult, MergeJob, ScoreJob
from tasks.timing import LABELS, Timing

MODEL = ArtifactRef("file:///store/finetune/a", "a")
EVALUATE = EvaluateSpec(num_images=100)
GENERATE = GeneratedFeaturesJob(
    label="row", images=GeneratedImages(models=(MODEL,), edges=None, seed=1), evaluate=EVALUATE, low=32, high=100
)
MERGING = {"pretrained": MODEL, "experts": (MODEL,), "method": MethodSpec(), "weights": (0.5,)}
SCORE = ScoreJob(**MERGING, label="score of 0.5", evaluate=EVALUATE, seeds=(7, 8), num_images=30, reference=MODEL)
MERGE = MergeJob(**MERGING)


def test_every_stage_has_a_name_for_people() -> None:
    assert {job.stage for job in JOBS.values()} == LABELS.keys()


def test_every_stage_that_computes_may_need_a_gpu() -> None:
    stage, _ = get_args(ExecutionSpec.model_fields["gpu_stages"].annotation)
    assert {job.stage for job in JOBS.values()} - {"problem", "checked"} == set(get_args(stage))


def add(timing: Timing, job: Job, seconds: float, *, cached: bool = False) -> None:
    """Notes a job that began ``seconds`` ago and ends now."""
    timing.add(job, time.perf_counter() - seconds, JobResult(MODEL, {}, cached, seconds, 0.25))


def test_only_what_was_generated_now_counts() -> None:
    timing = Timing()
    for cached in (False, True, False):
        add(timing, GENERATE, 1.0, cached=cached)
    add(timing, SCORE, 1.0)
    add(timing, MERGE, 1.0)
    features, search, merged = timing.costs()
    assert (features.stage, features.num_jobs, features.num_cached, features.num_images) == ("features", 3, 1, 136)
    assert (search.stage, search.num_images) == ("search", 60)
    assert (merged.stage, merged.num_images) == ("merged", 0)


def test_jobs_side_by_side_take_wall_time_once_and_worker_time_each() -> None:
    timing = Timing(started=time.perf_counter() - 10.0)
    add(timing, MERGE, 4.0)
    add(timing, MERGE, 3.0)
    (cost,) = timing.costs()
    assert cost.worker_seconds == pytest.approx(7.0, abs=0.2)
    assert cost.wall_seconds == pytest.approx(4.0, abs=0.2)
    seconds = timing.seconds()
    assert seconds["total"] == pytest.approx(10.0, abs=0.2)
    assert seconds["idle"] == pytest.approx(6.0, abs=0.2)
    assert seconds["storage"] == 0.5
    assert seconds["merged"] == pytest.approx(4.0, abs=0.2)
