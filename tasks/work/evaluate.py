"""The evaluation of one row under one sampling seed, from the features of its images."""

import shutil
from pathlib import Path

import numpy as np

from deme_core.bootstrap import resample
from deme_core.errors import DemeError
from deme_core.evaluation import score_conditions
from deme_core.feature_file import read_clip_scores, read_features
from deme_core.metrics import Comparison, deciding_metric, grouped_scores, needs_prompts, score
from deme_core.prompts import Prompts
from deme_core.recipe import EvaluateSpec
from deme_core.seeds import derive_seed
from tasks.jobs import EvaluateJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.generated_features import SAMPLES, image_inputs, image_settings
from tasks.work.prompted import check_prompts, prompt_settings, prompts_of
from tasks.work.scoring import (
    check_extractor,
    evaluation_settings,
    load_reference,
)


def identity(job: EvaluateJob, context: JobContext) -> Identity:
    """Models, seed, real images, prompts, sampling and metrics; neither the other seeds nor the slices."""
    excluded = {"seeds", "batch_size", "num_reference_images"}
    evaluate = evaluation_settings(job.evaluate, context, exclude=excluded)
    return Identity(
        settings={**image_settings(job.images), "evaluate": evaluate},
        inputs=image_inputs(job.images) | {"reference": job.reference.digest},
    )


def run(job: EvaluateJob, context: JobContext, out: Path, digest: str) -> Work:
    """Scores the images, and resamples of them by the deciding metric; keeps the grid of the first ones."""
    evaluate, reference = job.evaluate, load_reference(context, job.reference)
    folders = [context.fetch(ref) for ref in job.features]
    sources = [context.artifacts.manifest(ref).metrics["conditions"] for ref in job.features]
    if any(source != sources[0] for source in sources):
        raise DemeError(f"The slices of the image set of seed {job.images.seed} were generated under other conditions.")
    check_extractor(evaluate.extractor_name, sources[0]["extractor"], reference)
    check_prompts(prompt_settings(evaluate, context), sources[0])
    features = np.concatenate(list(read_features(folders)))
    assert len(features) == evaluate.num_images, (len(features), evaluate.num_images)
    yield {"done": 0, "total": evaluate.num_bootstrap}
    comparison = Comparison(
        features=features,
        reference=reference,
        kid_subset_size=evaluate.kid_subset_size,
        # Which images they hold is luck, which the interval over sampling seeds sees only if each seed has its own.
        kid_seed=derive_seed("subsets of the kernel distance", job.images.seed) % 2**32,
        clip_scores=read_clip_scores(folders) if needs_prompts(evaluate.metrics) else None,
    )
    shutil.copyfile(folders[0] / SAMPLES, out / SAMPLES)
    conditions = score_conditions(
        reference, num_images=len(features), metrics=evaluate.metrics, kid_subset_size=evaluate.kid_subset_size
    )
    if evaluate.metrics[0] == "kid":
        conditions["kid_subsets"] = "of each sampling seed"  # Until version 4 all seeds had the same.
    return {
        "scores": score(comparison, evaluate.metrics),
        "replicates": _replicates(comparison, evaluate, job.images.seed),
        "seed": job.images.seed,
        "conditions": sources[0] | conditions,
        **_details(comparison, prompts_of(evaluate, context)),
    }


def _replicates(comparison: Comparison, evaluate: EvaluateSpec, seed: int) -> list[float]:
    """Returns what the deciding metric gives resamples of the images; empty where none are asked for."""
    if not evaluate.num_bootstrap:
        return []
    metric = deciding_metric(evaluate.metrics[0])
    assert metric is not None, evaluate.metrics
    part = comparison.parts[0]
    # Of so many real images that their features were not kept, the draw hardly matters.
    num_real = None if part.reference.features is None else part.reference.num_images
    resamples = resample(len(part.features), num_real, num_replicates=evaluate.num_bootstrap, seed=seed)
    return [float(f"{value:.7g}") for value in metric.replicates(part, resamples)]


def _details(comparison: Comparison, prompts: Prompts | None) -> dict[str, dict[str, float]]:
    """Returns scores by groups of prompts, where there are groups: too many for a table."""
    if comparison.clip_scores is None or prompts is None:
        return {}
    details = grouped_scores(comparison.clip_scores, prompts.columns)
    return {"details": details} if details else {}
