"""The search for merge weights, or for the control's scale."""

import json
from collections.abc import Iterator
from pathlib import Path

from deme_core.evaluation import Evaluation
from deme_core.generate import SingleModel
from deme_core.live_merge import LiveMerge
from deme_core.metrics import metric_name
from deme_core.model_folder import load_unet, open_model_folder
from deme_core.search import Candidate, Weights, best_candidate, max_candidates, search_weights
from tasks.jobs import SearchJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.scoring import build_evaluation


def identity(job: SearchJob, context: JobContext) -> Identity:
    """Models, real images, strategy and sampling; the report's seeds and counts are no part of it."""
    inputs = {"pretrained": job.pretrained.digest, "reference": job.reference.digest}
    inputs |= {f"expert-{index}": expert.digest for index, expert in enumerate(job.experts)}
    report_only = {"seeds", "num_images", "num_reference_images", "batch_size"}
    return Identity(
        settings={
            "search": job.search.model_dump(mode="json", exclude={"num_reference_images"}),
            "evaluate": job.evaluate.model_dump(mode="json", exclude=report_only),
            "num_segments": job.num_segments,
        },
        inputs=inputs,
    )


def run(job: SearchJob, context: JobContext, out: Path, digest: str) -> Work:
    """Scores candidate after candidate; writes all of them."""
    folder = open_model_folder(context.fetch(job.pretrained))
    merge = LiveMerge(
        load_unet(folder).eval().to(context.device),
        [open_model_folder(context.fetch(expert)).checkpoint() for expert in job.experts],
    )
    evaluation = build_evaluation(
        context, job.evaluate, model=folder, reference=job.reference, num_images=job.search.num_images
    )
    candidates = []
    for candidate in _candidates(job, merge, evaluation):
        candidates.append(candidate)
        best = best_candidate(candidates)
        yield {
            "done": len(candidates),
            "total": max_candidates(job.search, num_weights=len(job.experts), num_segments=job.num_segments),
            "weights": list(candidate.weights),
            "score": candidate.score,
            "best_score": best.score,
        }
    best = best_candidate(candidates)
    tried = [{"weights": list(c.weights), "score": c.score} for c in candidates]
    (out / "candidates.json").write_text(json.dumps(tried, indent=1))
    return {"weights": list(best.weights), "score": best.score, "candidates": tried}


def _candidates(job: SearchJob, merge: LiveMerge, evaluation: Evaluation) -> Iterator[Candidate]:
    metric = metric_name(job.evaluate.metrics[0], evaluation.reference.extractor_name)
    denoiser = SingleModel(merge.model)

    def mean_score(weights: Weights) -> float:
        merge.set_weights(weights)
        scores = [evaluation.score(denoiser, seed)[0][metric] for seed in job.search.seeds]
        return sum(scores) / len(scores)

    return search_weights(mean_score, job.search, num_weights=len(job.experts), num_segments=job.num_segments)
