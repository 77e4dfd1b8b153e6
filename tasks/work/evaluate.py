"""The evaluation of one row under one sampling seed, from the features of its images."""

import shutil
from pathlib import Path

import numpy as np

from deme_core.bootstrap import replicates, resample
from deme_core.errors import DemeError
from deme_core.evaluation import score_conditions
from deme_core.feature_file import read_features
from deme_core.metrics import score
from tasks.jobs import EvaluateJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.generated_features import SAMPLES, image_inputs, image_settings
from tasks.work.scoring import check_extractor, load_reference


def identity(job: EvaluateJob, context: JobContext) -> Identity:
    """Models, seed, real images, sampling and metrics; the other seeds are no part of it, nor are the slices."""
    excluded = {"seeds", "batch_size", "num_reference_images"}
    return Identity(
        settings={**image_settings(job.images), "evaluate": job.evaluate.model_dump(mode="json", exclude=excluded)},
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
    features = np.concatenate(list(read_features(folders)))
    assert len(features) == evaluate.num_images, (len(features), evaluate.num_images)
    yield {"done": 0, "total": evaluate.num_bootstrap}
    scores = score(features, reference, metrics=evaluate.metrics, kid_subset_size=evaluate.kid_subset_size)
    found: list[float] = []
    if evaluate.num_bootstrap:
        counts = resample(len(features), num_replicates=evaluate.num_bootstrap, seed=job.images.seed)
        found = [float(f"{value:.7g}") for value in replicates(evaluate.metrics[0], features, reference, counts)]
    shutil.copyfile(folders[0] / SAMPLES, out / SAMPLES)
    conditions = score_conditions(
        reference, num_images=len(features), metrics=evaluate.metrics, kid_subset_size=evaluate.kid_subset_size
    )
    return {"scores": scores, "replicates": found, "seed": job.images.seed, "conditions": sources[0] | conditions}
