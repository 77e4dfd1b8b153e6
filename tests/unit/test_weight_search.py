"""A search whose candidates are measured by several workers at once, by functions in place of models."""

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, EvaluateSpec, MethodSpec, SearchSpec
from deme_core.search import Weights
from tasks.jobs import Job, JobResult, LossJob, ScoreJob, SearchJob
from tasks.progress import exhaust
from tasks.weight_search import find_weights

STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "grid"},
    {"strategy": "grid", "few_steps": 5},
    {"strategy": "coordinate"},
    {"strategy": "quadratic"},
    {"strategy": "tpe"},
    {"strategy": "cma_es"},
    {"strategy": "cma_es", "few_steps": 5},
]


def ref(stage: str, digest: str) -> ArtifactRef:
    return ArtifactRef(f"file:///store/{stage}/{digest}", digest)


def search_job(settings: dict[str, Any], **evaluate: Any) -> SearchJob:
    return SearchJob(
        pretrained=ref("pretrained", "p"),
        experts=(ref("finetune", "a"), ref("finetune", "b")),
        method=MethodSpec(),
        segment_edges=(0, 500, 1000),
        is_control=False,
        search=SearchSpec.model_validate({"max_candidates": 14, "num_images": 10, "seeds": (8, 9)} | settings),
        evaluate=EvaluateSpec.model_validate({"num_images": 20, "num_inference_steps": 50} | evaluate),
        dataset=DatasetSpec(source="digits"),
        reference=ref("reference", "r"),
    )


def score(weights: Weights, num_inference_steps: int) -> float:
    return (weights[0] - 0.3) ** 2 + 2 * (weights[1] - 0.6) ** 2 + weights[0] * weights[1] / num_inference_steps


class Workers:
    """Does the jobs of a search ``num_workers`` at a time; which ends first is left to chance."""

    def __init__(self, num_workers: int) -> None:
        self.done, self._num_workers = list[Job](), num_workers

    def __call__(self, jobs: Sequence[Job]) -> Iterator[JobResult]:
        with ThreadPoolExecutor(self._num_workers) as executor:
            yield from executor.map(self._do, jobs)

    def _do(self, job: Job) -> JobResult:
        time.sleep(random.uniform(0, 0.003))
        self.done.append(job)
        if isinstance(job, LossJob):
            value: Any = [1 + score(job.weights, 1), 2 + 3 * score(job.weights, 2)]
        else:
            assert isinstance(job, ScoreJob)
            value = score(job.weights, job.evaluate.num_inference_steps)
        return JobResult(ref("search", "x"), {"value": value}, False, 0.0, 0.0)


def found(settings: dict[str, Any], workers: Workers) -> dict[str, Any]:
    return exhaust(find_weights(search_job(settings), 2, workers), lambda _: None)


@pytest.mark.parametrize("settings", STRATEGIES, ids=str)
def test_neither_the_number_of_workers_nor_the_order_of_scores_changes_a_search(settings: dict[str, Any]) -> None:
    alone, many = found(settings, Workers(1)), found(settings, Workers(7))
    assert alone == many
    assert alone["candidates"][0]["weights"] == (0.0, 0.0)


@pytest.mark.parametrize("settings", STRATEGIES, ids=str)
def test_nothing_is_measured_twice_and_everything_counts(settings: dict[str, Any]) -> None:
    workers = Workers(3)
    result = found(settings, workers)
    assert len({job.model_dump_json() for job in workers.done}) == len(workers.done)
    scores = [job for job in workers.done if isinstance(job, ScoreJob)]
    assert result["num_images"] == 10 * 2 * len(scores)
    # With the losses that only tell how well they rank the candidates.
    num_losses = sum(isinstance(job, LossJob) for job in workers.done)
    assert result["num_losses"] == num_losses
    assert num_losses > 6 if settings["strategy"] in ("quadratic", "tpe", "cma_es") else num_losses == 0
    assert bool(num_losses) == ("heldout_loss" in result["rank_correlation"])


def test_only_what_has_a_score_is_counted_and_ranked() -> None:
    # Loss and score go opposite ways, and beyond a cliff there is neither.
    class Cliff(Workers):
        def _do(self, job: Job) -> JobResult:
            result, far = super()._do(job), sum(getattr(job, "weights", ()))
            loss_or_score = [None if far > 0.9 else [1 - far / 9] * 2, None if far > 0.9 else 1 + far]
            return replace(result, metrics={"value": loss_or_score[isinstance(job, ScoreJob)]})

    result = found({"strategy": "cma_es", "seeds": (8,), "initial_weight": 0.2}, Cliff(2))
    num_finite = sum(c["score"] is not None for c in result["candidates"])
    assert 3 <= num_finite < len(result["candidates"]) - 2
    assert result["num_images"] == 10 * num_finite
    assert result["rank_correlation"] == {"heldout_loss": -1.0}


@pytest.mark.parametrize("num_finite", [2, 3])
def test_two_candidates_with_scores_have_no_rank_correlation(num_finite: int) -> None:
    class Few(Workers):
        def _do(self, job: Job) -> JobResult:
            found = super()._do(job)
            self.num_scores = getattr(self, "num_scores", 0) + isinstance(job, ScoreJob)
            is_beyond = isinstance(job, ScoreJob) and self.num_scores > num_finite
            return replace(found, metrics={"value": None}) if is_beyond else found

    result = found({"strategy": "tpe", "max_candidates": 8}, Few(1))
    assert bool(result["rank_correlation"]) == (num_finite == 3)


def test_a_rough_score_is_the_full_score_of_fewer_steps() -> None:
    workers = Workers(2)
    found({"strategy": "grid", "few_steps": 5}, workers)
    scores = [job for job in workers.done if isinstance(job, ScoreJob)]
    assert {job.evaluate.num_inference_steps for job in scores} == {5, 50}


def test_weights_of_blocks_start_at_the_mean_of_the_copies() -> None:
    workers = Workers(1)
    exhaust(find_weights(search_job({}), 6, workers), lambda _: None)
    assert [job.weights for job in workers.done[:2] if isinstance(job, ScoreJob)] == [(0.0,) * 6, (0.5,) * 6]


def test_progress_comes_while_a_batch_is_measured() -> None:
    workers, records = Workers(1), find_weights(search_job({"strategy": "grid"}), 2, lambda jobs: workers(jobs))
    first = next(records)
    assert (first["done"], first["total"], first["weights"]) == (1, 9, [0.0, 0.0])
    assert [record["done"] for record in records] == list(range(2, 10))


class Praise(Workers):
    """Scores of which higher is better: what the others give, turned round."""

    def _do(self, job: Job) -> JobResult:
        result = super()._do(job)
        return replace(result, metrics={"value": -result.metrics["value"]}) if isinstance(job, ScoreJob) else result


@pytest.mark.parametrize("settings", STRATEGIES, ids=str)
def test_of_a_metric_like_the_clip_score_the_highest_is_searched(settings: dict[str, Any]) -> None:
    job = search_job(settings, metrics=("clip_score", "fid"), prompts="prompts.txt")
    records = list[dict[str, Any]]()
    praised = exhaust(find_weights(job, 2, Praise(3)), records.append)
    lowest = found(settings, Workers(3))
    assert praised["weights"] == lowest["weights"]
    assert praised["score"] == -lowest["score"] == max(c["score"] for c in praised["candidates"] if not c["rough"])
    assert [c["score"] for c in praised["candidates"]] == [-c["score"] for c in lowest["candidates"]]
    assert praised["rank_correlation"] == lowest["rank_correlation"]
    assert records[-1]["best_score"] == max(r["score"] for r in records if r["rough"] == records[-1]["rough"])


GUARDED = {"metrics": ("fid", "kid", "recall"), "more_extractors": ("pixels_4x4",)}
GUARDS = {"fd_pixels_4x4": lambda w: 2 + w[1], "recall": lambda w: 0.5 - w[0]}


class Guards(Workers):
    """Scores with two more, of which one rises, and the other, of which higher is better, falls with the weights."""

    def _do(self, job: Job) -> JobResult:
        result = super()._do(job)
        if not isinstance(job, ScoreJob):
            return result
        if job.weights == (0.5, 0.5):
            return replace(result, metrics={"value": None})
        scores = {"fid": result.metrics["value"]} | {name: guard(job.weights) for name, guard in GUARDS.items()}
        return replace(result, metrics=result.metrics | {"scores": scores})


@pytest.mark.parametrize(
    ("guards", "cost"),
    [
        (("fd_pixels_4x4",), lambda w: max(w[1], 0) / 2),
        (("recall",), lambda w: max(w[0], 0) / 0.5),
        (("fd_pixels_4x4", "recall"), lambda w: max(w[1], 0) / 2 + max(w[0], 0) / 0.5),
    ],
    ids=["lower is better", "higher is better", "both"],
)
def test_a_guard_that_gets_worse_costs_as_much_as_the_score_would(guards: tuple[str, ...], cost: Any) -> None:
    workers, settings = Guards(3), {"strategy": "grid", "values": (-0.5, 0.0, 0.5), "guards": guards}
    result = exhaust(find_weights(search_job(settings, **GUARDED), 2, workers), lambda _: None)
    of_pretrained = score((0, 0), 50)
    for candidate in result["candidates"]:
        w = candidate["weights"]
        if w == (0.5, 0.5):
            assert candidate["score"] is candidate["measured"] is None
            continue
        assert candidate["measured"]["fid"] == score(w, 50)
        assert candidate["score"] == pytest.approx(score(w, 50) + of_pretrained * cost(w))
    best = min((c for c in result["candidates"] if c["score"] is not None), key=lambda c: c["score"])
    assert (tuple(result["weights"]), result["score"]) == (best["weights"], best["score"])


def test_rough_scores_are_guarded_by_rough_ones() -> None:
    settings = {"strategy": "cma_es", "few_steps": 5, "guards": ("fd_pixels_4x4",)}
    result = exhaust(find_weights(search_job(settings, **GUARDED), 2, Guards(2)), lambda _: None)
    assert {c["rough"] for c in result["candidates"] if "measured" in c} == {True, False}
    for c in result["candidates"]:
        steps, w = 5 if c["rough"] else 50, c["weights"]
        if w == (0.5, 0.5):
            assert c["score"] is None
            continue
        assert c["score"] == pytest.approx(score(w, steps) + score((0, 0), steps) * max(w[1], 0) / 2)


def test_a_guard_costs_something_where_the_pretrained_model_scores_below_zero() -> None:
    class Below(Guards):
        def _do(self, job: Job) -> JobResult:
            found = super()._do(job)
            return replace(found, metrics=found.metrics | {"value": -1.0})

    settings = {"strategy": "grid", "values": (0.0, 0.25), "guards": ("fd_pixels_4x4",)}
    result = exhaust(find_weights(search_job(settings, **GUARDED), 2, Below(1)), lambda _: None)
    by_weights = {candidate["weights"]: candidate["score"] for candidate in result["candidates"]}
    assert by_weights[0.0, 0.25] > by_weights[0.0, 0.0] == -1.0


def test_of_two_with_the_same_guards_the_better_one_counts_as_the_better() -> None:
    """Also where one of them is on the other side of 0, as kernel distances may be."""

    class Near(Guards):
        def _do(self, job: Job) -> JobResult:
            found = super()._do(job)
            assert isinstance(job, ScoreJob)
            values = {(0.0, 0.0): 0.05, (0.0, 0.25): 1e-4, (0.25, 0.25): -1e-4}
            return replace(found, metrics=found.metrics | {"value": values.get(job.weights, 0.04)})

    settings = {"strategy": "grid", "values": (0.0, 0.25), "guards": ("fd_pixels_4x4",)}
    result = exhaust(find_weights(search_job(settings, **GUARDED), 2, Near(1)), lambda _: None)
    by_weights = {candidate["weights"]: candidate["score"] for candidate in result["candidates"]}
    assert by_weights[0.25, 0.25] < by_weights[0.0, 0.25] < by_weights[0.0, 0.0]


@pytest.mark.parametrize(("before", "after"), [(-1e-4, -1.2e-4), (0.0, -1e-6)])
def test_a_guard_holds_where_a_share_of_the_pretrained_models_score_is_about_nothing(
    before: float, after: float
) -> None:
    class About(Guards):
        def _do(self, job: Job) -> JobResult:
            found = super()._do(job)
            assert isinstance(job, ScoreJob)
            return replace(found, metrics=found.metrics | {"value": after if any(job.weights) else before})

    # The second weight makes the guard worse, the first does not.
    settings = {"strategy": "grid", "values": (0.0, 0.25), "guards": ("fd_pixels_4x4",)}
    result = exhaust(find_weights(search_job(settings, **GUARDED), 2, About(1)), lambda _: None)
    by_weights = {candidate["weights"]: candidate["score"] for candidate in result["candidates"]}
    assert by_weights[0.0, 0.25] > before
    assert by_weights[0.25, 0.25] > before
    assert (by_weights[0.25, 0.0], tuple(result["weights"])) == (after, (0.25, 0.0))
