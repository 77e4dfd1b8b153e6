"""Features of a slice of the real images, those of the search or those of the report."""

from pathlib import Path

import numpy as np
import torch

from deme_core.digests import json_digest
from deme_core.evaluation import num_searched, split_reference
from deme_core.extractors import FeatureExtractor, extractors_digest, load_extractors
from deme_core.feature_file import save_features
from deme_core.feature_statistics import check_features
from deme_core.recipe import EvaluateSpec
from deme_core.slices import REAL_BATCH_SIZE
from tasks.jobs import RealFeaturesJob, ReferenceJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.naming import naming
from tasks.work.prompted import prompt_settings


def identity(job: RealFeaturesJob, context: JobContext) -> Identity:
    """The real images of the slice, and the extractor."""
    if job.low == 0:
        # Of no use here; but what cannot be had is told now, beside the trainings, and not after them.
        prompt_settings(job.evaluate, context)
    indices = real_indices(job, context)[job.low : job.high]
    return Identity(
        settings={"indices": indices_digest(indices), "extractor": extractor_digest(job.evaluate, context)},
        dataset=context.images(job.dataset).reference_fingerprint,
    )


def run(job: RealFeaturesJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the features, and how many images there are in all slices."""
    images, all_indices = context.images(job.dataset), real_indices(job, context)
    indices = all_indices[job.low : job.high]
    extractor = extractor_of(job.evaluate, context)
    features = []
    for start in range(0, len(indices), REAL_BATCH_SIZE):
        batch = torch.stack([images.image(index) for index in indices[start : start + REAL_BATCH_SIZE]])
        with naming("Real images"):
            features.append(check_features(extractor(batch), at_least=1))
        yield {"done": start + len(batch), "total": len(indices)}
    save_features(out, np.concatenate(features))
    return {"num_images": len(indices), "num_in_all": len(all_indices)}


def indices_digest(indices: list[int]) -> str:
    """Returns the digest of which images of a data set are meant."""
    return json_digest(indices)


def real_indices(job: RealFeaturesJob | ReferenceJob, context: JobContext) -> list[int]:
    """Returns the images of the data set that the part uses.

    Raises:
        DatasetError: more are asked for than there are.
    """
    num_images, num_for_report = len(context.images(job.dataset)), job.evaluate.num_reference_images
    aside = num_searched(num_images, job.num_for_search, num_for_report if job.part == "report" else None)
    for_search, for_report = split_reference(num_images, aside, num_for_report)
    return for_search if job.part == "search" else for_report


def extractor_digest(evaluate: EvaluateSpec, context: JobContext) -> str:
    """Returns the digest of what `extractor_of` returns; work that was done before needs no more of it."""
    return context.remember(
        f"digest of {_extractor_key(evaluate)}",
        lambda: extractors_digest(
            evaluate.extractor_names,
            weights=evaluate.extractor_weights,
            resolution=evaluate.extractor_resolution,
            cache=context.settings.cache_folder,
        ),
    )


def extractor_of(evaluate: EvaluateSpec, context: JobContext) -> FeatureExtractor:
    """Returns the feature extractor that a recipe names, or all of them as one."""
    return context.remember(
        _extractor_key(evaluate),
        lambda: load_extractors(
            evaluate.extractor_names,
            weights=evaluate.extractor_weights,
            resolution=evaluate.extractor_resolution,
            cache=context.settings.cache_folder,
            device=context.device,
        ),
    )


def _extractor_key(evaluate: EvaluateSpec) -> str:
    return f"extractor {evaluate.extractor_names} {evaluate.extractor_weights} {evaluate.extractor_resolution}"
