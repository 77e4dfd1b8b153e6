"""The score of one candidate of a search: images of its live merge against the search's real images."""

from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from deme_core.errors import NonFiniteImagesError
from deme_core.evaluation import score_images
from deme_core.generate import SingleModel
from deme_core.recipe import EvaluateSpec
from tasks.jobs import ScoreJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.live_model import live_merge, merge_inputs
from tasks.work.naming import naming
from tasks.work.scoring import build_source, check_extractor, evaluation_settings, load_reference


def identity(job: ScoreJob, context: JobContext) -> Identity:
    """Models, weights, real images, seeds and sampling: whichever search asks, the score is the same."""
    inputs, merge = merge_inputs(job)
    sampling = {
        "evaluate": candidate_settings(job.evaluate, context),
        "seeds": list(job.seeds),
        "num_images": job.num_images,
    }
    return Identity(settings={"kind": "score"} | merge | sampling, inputs=inputs | {"reference": job.reference.digest})


def candidate_settings(evaluate: EvaluateSpec, context: JobContext) -> dict[str, Any]:
    """Returns what of an evaluation decides the score of a candidate, which is neither the report's nor resampled."""
    report_only = {"seeds", "num_images", "num_reference_images", "batch_size", "num_bootstrap"}
    settings = evaluation_settings(evaluate, context, exclude=report_only)
    # Digests have had the default number of resamples from the start: scores that were paid for are found by it.
    return settings | {"num_bootstrap": EvaluateSpec.model_fields["num_bootstrap"].default}


def run(job: ScoreJob, context: JobContext, out: Path, digest: str) -> Work:
    """Returns the mean of the first score over the search's seeds, and of all by name; None if images are not finite.

    Weights that go too far are what a search has to expect. The pretrained model, all weights zero, must score.
    """
    folder, merge = live_merge(job, context)
    source, reference = build_source(context, job.evaluate, model=folder), load_reference(context, job.reference)
    check_extractor(source.extractor.name, source.extractor.digest, reference)
    score_seed = partial(
        score_images,
        source,
        SingleModel(merge.model),
        num_images=job.num_images,
        reference=reference,
        metrics=job.evaluate.metrics,
        kid_subset_size=job.evaluate.kid_subset_size,
    )
    scores: list[dict[str, float]] = []
    for seed in job.seeds:
        yield {"done": len(scores), "total": len(job.seeds)}
        try:
            with naming(job.label):
                scores.append(score_seed(seed))
        except NonFiniteImagesError:
            if not any(job.weights):
                raise
            return {"value": None}
    means = {name: fmean(of_seed[name] for of_seed in scores) for name in scores[0]}
    return {"value": means[job.evaluate.score_names[0]], "scores": means}
