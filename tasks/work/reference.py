"""The reference: features of the real images that generated ones are scored against."""

from pathlib import Path

import numpy as np
import torch

from deme_core.digests import canonical_json, sha256_bytes
from deme_core.errors import DatasetError
from deme_core.evaluation import split_reference
from deme_core.extractors import FeatureExtractor, load_extractor
from deme_core.metrics import Reference
from deme_core.recipe import EvaluateSpec
from tasks.jobs import ReferenceJob
from tasks.work.base import Identity, JobContext, Work

_BATCH_SIZE = 64


def identity(job: ReferenceJob, context: JobContext) -> Identity:
    """The real images that are used, and the extractor."""
    return Identity(
        settings={"indices": _indices_digest(job, context), "extractor": extractor_of(job.evaluate, context).digest},
        dataset=context.images(job.dataset).reference_fingerprint,
    )


def run(job: ReferenceJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the features."""
    images, indices = context.images(job.dataset), _indices(job, context)
    extractor = extractor_of(job.evaluate, context)
    features = []
    for start in range(0, len(indices), _BATCH_SIZE):
        batch = torch.stack([images.image(index) for index in indices[start : start + _BATCH_SIZE]])
        features.append(extractor(batch))
        yield {"done": start + len(batch), "total": len(indices)}
    reference = Reference(
        np.concatenate(features),
        extractor_name=extractor.name,
        extractor_digest=extractor.digest,
        images_digest=sha256_bytes(f"{images.reference_fingerprint} {_indices_digest(job, context)}".encode()),
    )
    reference.save(out)
    return {
        "num_images": reference.num_images,
        "num_features": extractor.num_features,
        "shape": [images.channels, images.resolution, images.resolution],
    }


def _indices_digest(job: ReferenceJob, context: JobContext) -> str:
    return sha256_bytes(canonical_json(_indices(job, context)).encode())


def _indices(job: ReferenceJob, context: JobContext) -> list[int]:
    num_images = len(context.images(job.dataset))
    num_for_search = num_images // 2 if job.num_for_search is None else job.num_for_search
    if num_for_search > num_images - 2:
        raise DatasetError(
            f"merge.search.num_reference_images {num_for_search} leaves none of the {num_images} images of the data "
            "set for the report; lower it."
        )
    for_search, for_report = split_reference(num_images, num_for_search)
    if job.part == "search":
        return for_search
    wanted = job.evaluate.num_reference_images or len(for_report)
    if wanted > len(for_report):
        raise DatasetError(
            f"evaluate.num_reference_images asks for {wanted} images, but only {len(for_report)} are there; lower it."
        )
    return for_report[:wanted]


def extractor_of(evaluate: EvaluateSpec, context: JobContext) -> FeatureExtractor:
    """Returns the feature extractor that a recipe names."""
    key = f"extractor {evaluate.extractor_name} {evaluate.extractor_weights} {evaluate.extractor_resolution}"
    return context.remember(
        key,
        lambda: load_extractor(
            evaluate.extractor_name,
            weights=evaluate.extractor_weights,
            resolution=evaluate.extractor_resolution,
            cache=context.settings.cache_folder,
            device=context.device,
        ),
    )
