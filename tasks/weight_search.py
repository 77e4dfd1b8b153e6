"""A search for merge weights, driven from the flow process: its candidates are jobs that workers do side by side.

What a strategy proposes together is measured together. Every measurement is an artifact of its own, so a search that
was killed goes on where it was, and no two searches score the same candidate twice.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from deme_core.artifacts import ArtifactStore
from deme_core.errors import InputError
from deme_core.metrics import METRICS, higher_is_better
from deme_core.search import (
    Batch,
    Candidate,
    Kind,
    Weights,
    best_candidate,
    max_candidates,
    scored_candidates,
    search_weights,
)
from tasks.jobs import Job, JobResult, LossJob, ScoreJob, SearchJob
from tasks.progress import Record, Report, exhaust

# Does jobs in any order, and gives their results in that of the jobs, each as soon as it is there.
Do = Callable[[Sequence[Job]], Iterable[JobResult]]

_STAGE = "weights"


def search_artifact(job: SearchJob, artifacts: ArtifactStore, do: Do, report: Report) -> JobResult:
    """Returns the artifact of a search, searching only if the store does not have it.

    Args:
        job: what to search.
        artifacts: the store.
        do: has jobs done.
        report: called with a progress record for every candidate.
    """
    started = time.perf_counter()
    (described,) = do([job])
    if found := artifacts.find_metrics(_STAGE, described.ref.digest):
        return JobResult(*found, True, time.perf_counter() - started, 0.0)
    metrics = exhaust(find_weights(job, described.metrics["num_weights"], do), report)
    manifest = artifacts.manifest(described.ref)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "candidates.json").write_text(json.dumps(metrics["candidates"], indent=1))
        ref, metrics = artifacts.publish(
            _STAGE,
            manifest.digest,
            Path(folder),
            settings=manifest.settings,
            inputs=manifest.inputs,
            dataset=manifest.dataset,
            metrics=metrics,
        )
    return JobResult(ref, metrics, False, time.perf_counter() - started, 0.0)


def find_weights(job: SearchJob, num_weights: int, do: Do) -> Generator[Record, None, dict[str, Any]]:
    """Yields a progress record per candidate; returns the best weights, all candidates, and what they cost.

    Raises:
        InputError: the search's budget or grid does not suit so many weights.
    """
    if shortcoming := job.search.shortcoming(num_weights):
        raise InputError(f"merge.search: {shortcoming}.")
    measured, num_segments = _Measurements(job, num_weights, do), len(job.segment_edges) - 1
    total = max_candidates(job.search, num_weights=num_weights, num_segments=num_segments, is_control=job.is_control)
    batches = search_weights(
        job.search,
        num_weights=num_weights,
        num_copies=len(job.experts),
        num_segments=num_segments,
        is_control=job.is_control,
    )
    candidates: list[Candidate] = []
    for candidate in scored_candidates(batches, measured.scores):
        candidates.append(candidate)
        yield {
            "done": len(candidates),
            "total": total,
            "weights": list(candidate.weights),
            "score": measured.told(candidate.score),
            "rough": candidate.rough,
            "best_score": measured.told(min(c.score for c in candidates if c.rough == candidate.rough)),
        }
    best = best_candidate(candidates)
    correlations = _rank_correlations(candidates, measured if measured.cost()["num_losses"] else None)
    return {
        "weights": list(best.weights),
        "score": measured.told(best.score),
        "candidates": [asdict(c) | {"score": measured.told(c.score)} | measured.made_of(c) for c in candidates],
        # With the losses that only tell how well they rank the candidates.
        **measured.cost(),
        "rank_correlation": correlations,
    }


class _Measurements:
    """Scores and losses of weights, each asked for once, and what they cost.

    Attributes:
        sign: a search minimises, so that it is shown the negative scores of a metric of which higher is better.
    """

    def __init__(self, job: SearchJob, num_weights: int, do: Do) -> None:
        self._job, self._do, self._zero = job, do, (0.0,) * num_weights
        self._known: dict[tuple[Kind, Weights], Any] = {}
        self._guards = job.search.guards
        self.sign = -1.0 if METRICS[job.evaluate.metrics[0]].higher_is_better else 1.0

    def scores(self, batch: Batch) -> Iterator[float]:
        """Yields the scores or losses of a batch in its order, as they come, the lower the better.

        What could not be measured, since the merge's images or losses are not finite, is infinitely bad.
        """
        if batch.kind == "loss":
            return self.losses(batch.weights)
        return (self._score(batch.kind, found) for found in self._values(batch.kind, batch.weights))

    def _score(self, kind: Kind, found: Mapping[str, Any]) -> float:
        """Returns the score of a candidate, worse where guards are worse than the pretrained model's.

        By shares of the pretrained model's score; where there is no share, worse than that score at least.
        So of two with the same guards the better one never counts as the worse.
        """
        if found["value"] is None:
            return math.inf
        before = self._known[kind, self._zero]
        worse = sum(self._worsening(found["scores"][name], before["scores"][name], name) for name in self._guards)
        score = self.sign * float(found["value"]) + abs(before["value"]) * worse
        if worse and before["value"] <= 0:
            # A kernel distance about 0, whose sign is chance: a share of it is nothing that a guard could cost.
            return max(score, math.nextafter(self.sign * before["value"], math.inf))
        return score

    @staticmethod
    def _worsening(score: float, before: float, name: str) -> float:
        """Returns by which share of itself a score is worse than ``before``, 0 if it is not."""
        change = before - score if higher_is_better(name) else score - before
        return max(change, 0.0) / (abs(before) or 1.0)

    def made_of(self, candidate: Candidate) -> dict[str, Any]:
        """Returns what the score of a candidate is made of, where that is more than one number."""
        kind: Kind = "rough" if candidate.rough else "full"
        return {"measured": self._known[kind, candidate.weights].get("scores")} if self._guards else {}

    def told(self, score: float) -> float | None:
        """Returns the score of a candidate in the direction of its metric; None if there is none."""
        return self.sign * score if math.isfinite(score) else None

    def losses(self, weights: Sequence[Weights]) -> Iterator[float]:
        """Yields held-out losses, relative to the pretrained model's in each segment, mean over the segments."""
        values = (found["value"] for found in self._values("loss", [self._zero, *weights]))
        before = next(values)
        return (
            math.inf if losses is None else fmean(loss / of_zero for loss, of_zero in zip(losses, before, strict=True))
            for losses in values
        )

    def cost(self) -> dict[str, int]:
        """Returns how many images the scores and how many losses were needed, those that the store had included.

        A candidate without a score ended at its first images that were not finite; how many there were nobody knows.
        """
        each, kinds = self._job.search.num_images * len(self._job.search.seeds), [kind for kind, _ in self._known]
        num_scores = sum(kind != "loss" and found["value"] is not None for (kind, _), found in self._known.items())
        return {"num_images": each * num_scores, "num_losses": kinds.count("loss")}

    def _values(self, kind: Kind, weights: Sequence[Weights]) -> Iterator[Any]:
        new = [key for w in dict.fromkeys(weights) if (key := (kind, w)) not in self._known]
        results = zip(new, self._do([self._measurement(*key) for key in new]), strict=True)
        for w in weights:
            while (kind, w) not in self._known:
                key, result = next(results)
                self._known[key] = result.metrics
            yield self._known[kind, w]

    def _measurement(self, kind: Kind, weights: Weights) -> Job:
        job, text = self._job, ", ".join(f"{weight:g}" for weight in weights)
        model = {"pretrained": job.pretrained, "experts": job.experts, "method": job.method, "weights": weights}
        if kind == "loss":
            return LossJob(
                **model, label=f"held-out loss of {text}", dataset=job.dataset, segment_edges=job.segment_edges
            )
        # A rough score is a full one of as few steps.
        changed = {"num_inference_steps": job.search.few_steps} if kind == "rough" else {}
        return ScoreJob(
            **model,
            label=f"{kind} score of {text}",
            evaluate=job.evaluate.model_copy(update=changed),
            seeds=job.search.seeds,
            num_images=job.search.num_images,
            reference=job.reference,
        )


def _rank_correlations(candidates: Sequence[Candidate], measured: _Measurements | None) -> dict[str, float]:
    """Returns Spearman's rank correlation of each proxy that was used with the full scores.

    With few steps it is over the survivors, which are few and were chosen by the proxy: it is lower than over all.
    What has no score has no rank, and fewer than three have no correlation.
    """
    full = {c.weights: c.score for c in candidates if not c.rough and math.isfinite(c.score)}
    rough = {c.weights: c.score for c in candidates if c.rough}
    if len(full) < 3:
        return {}
    proxies: dict[str, list[float]] = {}
    if measured is not None:
        proxies["heldout_loss"] = list(measured.losses(list(full)))
    if rough:
        proxies["few_steps"] = [rough[weights] for weights in full]
    correlations = {name: _spearman(values, list(full.values())) for name, values in proxies.items()}
    return {name: rho for name, rho in correlations.items() if rho is not None}


def _spearman(left: list[float], right: list[float]) -> float | None:
    """Returns the rank correlation of finite pairs; None of fewer than three, or where all of one side are equal."""
    from scipy.stats import spearmanr

    finite = [pair for pair in zip(left, right, strict=True) if all(map(math.isfinite, pair))]
    if len(finite) < 3 or any(len(set(side)) == 1 for side in zip(*finite, strict=True)):
        return None
    return round(float(spearmanr(*zip(*finite, strict=True)).statistic), 4)
