"""The search for merge weights, or for the control's scale."""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deme_core.binned_losses import bin_edges, widths
from deme_core.evaluation import Evaluation
from deme_core.generate import SingleModel
from deme_core.heldout_loss import heldout_losses
from deme_core.live_merge import LiveMerge
from deme_core.merge_methods.build import build_method, num_weights
from deme_core.metrics import metric_name
from deme_core.model_folder import ModelFolder, load_unet, open_model_folder
from deme_core.search import Candidate, Weights, best_candidate, max_candidates, search_weights
from deme_core.search.score_log import ScoreLog
from tasks.jobs import SearchJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.scoring import build_evaluation

# Other noise than the report's held-out loss has.
_PROXY_SEED = 1


def identity(job: SearchJob, context: JobContext) -> Identity:
    """Models, real images, strategy and sampling; the report's seeds and counts are no part of it."""
    inputs = {"pretrained": job.pretrained.digest, "reference": job.reference.digest}
    inputs |= {f"expert-{index}": expert.digest for index, expert in enumerate(job.experts)}
    report_only = {"seeds", "num_images", "num_reference_images", "batch_size"}
    return Identity(
        settings={
            "search": job.search.model_dump(mode="json", exclude={"num_reference_images"}),
            "evaluate": job.evaluate.model_dump(mode="json", exclude=report_only),
            "segment_edges": list(job.segment_edges),
            "is_control": job.is_control,
            "merge": job.method.settings(),
        },
        inputs=inputs,
        dataset=context.heldout_images(job.dataset).reference_fingerprint,
    )


def run(job: SearchJob, context: JobContext, out: Path, digest: str) -> Work:
    """Scores candidate after candidate; writes all of them, and how well the held-out loss ranks them."""
    problem = _Problem(job, context, ScoreLog(context.unfinished_folder(digest) / "scores.jsonl"))
    num_segments = len(job.segment_edges) - 1
    total = max_candidates(
        job.search, num_weights=problem.num_weights, num_segments=num_segments, is_control=job.is_control
    )
    candidates: list[Candidate] = []
    for candidate in search_weights(
        problem.score,
        job.search,
        num_weights=problem.num_weights,
        num_segments=num_segments,
        is_control=job.is_control,
        proxy=problem.loss,
        rough=problem.rough_score if job.search.few_steps else None,
    ):
        candidates.append(candidate)
        yield {
            "done": len(candidates),
            "total": total,
            "weights": list(candidate.weights),
            "score": candidate.score,
            "rough": candidate.rough,
            "best_score": min(c.score for c in candidates if c.rough == candidate.rough),
        }
    best = best_candidate(candidates)
    (out / "candidates.json").write_text(json.dumps([asdict(c) for c in candidates], indent=1))
    return {
        "weights": list(best.weights),
        "score": best.score,
        "candidates": [asdict(c) for c in candidates],
        "num_images": problem.num_images,
        "num_losses": problem.num_losses,
        "rank_correlation": _rank_correlations(candidates, problem),
    }


def _rank_correlations(candidates: list[Candidate], problem: "_Problem") -> dict[str, float]:
    """Returns Spearman's rank correlation of each proxy that was used with the full scores, if three are there."""
    full = {c.weights: c.score for c in candidates if not c.rough}
    proxies: dict[str, Callable[[Weights], float]] = {"heldout_loss": problem.loss} if problem.num_losses else {}
    if rough := {c.weights: c.score for c in candidates if c.rough}:
        proxies["few_steps"] = rough.__getitem__
    if len(full) < 3:
        return {}
    return {name: _spearman([proxy(w) for w in full], list(full.values())) for name, proxy in proxies.items()}


def _spearman(left: list[float], right: list[float]) -> float:
    from scipy.stats import spearmanr

    return round(float(spearmanr(left, right).statistic), 4)


class _Problem:
    """Scores and losses of weights, each computed once, and what they cost.

    Attributes:
        num_weights: how many weights a candidate has.
    """

    def __init__(self, job: SearchJob, context: JobContext, log: ScoreLog) -> None:
        self._job, self._context, self._log = job, context, log
        self._folder = open_model_folder(context.fetch(job.pretrained))
        self._merge = LiveMerge(
            load_unet(self._folder).eval().to(context.device),
            [open_model_folder(context.fetch(expert)).checkpoint() for expert in job.experts],
        )
        self.num_weights = num_weights(job.method, len(job.experts), self._merge.names)
        self._full = self._evaluation(job.evaluate.num_inference_steps)
        self._rough = self._evaluation(job.search.few_steps) if job.search.few_steps else None

    def _evaluation(self, num_inference_steps: int) -> Evaluation:
        job = self._job
        evaluate = job.evaluate.model_copy(update={"num_inference_steps": num_inference_steps})
        return build_evaluation(
            self._context, evaluate, model=self._folder, reference=job.reference, num_images=job.search.num_images
        )

    @property
    def num_images(self) -> int:
        """Images generated, with few steps or all, by earlier processes too."""
        each = self._job.search.num_images * len(self._job.search.seeds)
        return each * (self._log.count("full") + self._log.count("rough"))

    @property
    def num_losses(self) -> int:
        """Held-out losses measured, by earlier processes too."""
        return self._log.count("loss")

    def score(self, weights: Weights) -> float:
        """Returns the mean score over the search's seeds."""
        return self._score("full", self._full, weights)

    def rough_score(self, weights: Weights) -> float:
        """Returns the same with few sampling steps."""
        assert self._rough is not None
        return self._score("rough", self._rough, weights)

    def _score(self, kind: str, evaluation: Evaluation, weights: Weights) -> float:
        metric = metric_name(self._job.evaluate.metrics[0], evaluation.reference.extractor_name)

        def compute() -> float:
            self._set(weights)
            seeds = self._job.search.seeds
            scores = [evaluation.score(SingleModel(self._merge.model), seed)[0][metric] for seed in seeds]
            return sum(scores) / len(scores)

        return float(self._log.remember(kind, weights, compute))

    def loss(self, weights: Weights) -> float:
        """Returns the held-out loss, relative to the pretrained model's in each segment, mean over the segments."""
        before = self._segment_losses((0.0,) * self.num_weights)
        return float(np.mean(self._segment_losses(weights) / before))

    def _segment_losses(self, weights: Weights) -> "np.ndarray[Any, np.dtype[np.float64]]":
        edges = bin_edges(self._folder.num_train_timesteps, self._job.segment_edges)

        def compute() -> list[float]:
            self._set(weights)
            bins = _mean_bins(self._merge.model, self._folder, self._context, self._job, edges)
            share = widths(edges)
            return [
                float(sum(share[b] * bins[b] for b in range(len(bins)) if low <= edges[b] < high))
                for low, high in itertools.pairwise(self._job.segment_edges)
            ]

        return np.array(self._log.remember("loss", weights, compute))

    def _set(self, weights: Weights) -> None:
        self._merge.apply(build_method(self._job.method, weights, len(self._job.experts), self._merge.names))


def _mean_bins(
    model: Any, folder: ModelFolder, context: JobContext, job: SearchJob, edges: tuple[int, ...]
) -> list[float]:
    from diffusers import DDPMScheduler

    losses = heldout_losses(
        model,
        DDPMScheduler.from_config(folder.scheduler_config),
        context.heldout_images(job.dataset),
        edges=edges,
        seed=_PROXY_SEED,
        device=context.device,
    )
    found: list[float] = losses.mean(axis=0, dtype=np.float64).tolist()
    return found
