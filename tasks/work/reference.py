"""The reference: what the scores need of the real images' features, read slice by slice."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deme_core.digests import sha256_bytes
from deme_core.feature_file import read_features
from deme_core.feature_statistics import Features, FeatureStatistics
from deme_core.metrics import needs_features
from deme_core.reference import Reference
from tasks.jobs import ReferenceJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.real_features import extractor_of, indices_digest, real_indices


def identity(job: ReferenceJob, context: JobContext) -> Identity:
    """The real images that are used, and the extractor; how they were sliced is no part of it."""
    return Identity(
        settings={
            "indices": indices_digest(real_indices(job, context)),
            "extractor": extractor_of(job.evaluate, context).digest,
            "keeps_features": needs_features(job.evaluate.metrics),
        },
        dataset=context.images(job.dataset).reference_fingerprint,
    )


def run(job: ReferenceJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the features, or mean and covariance where these suffice, in memory that no number of images changes."""
    images, extractor = context.images(job.dataset), extractor_of(job.evaluate, context)
    indices = real_indices(job, context)
    batches = read_features([context.fetch(ref) for ref in job.features])
    yield {"done": 0, "total": len(indices)}
    features, statistics = _reduced(batches, keeps_features=needs_features(job.evaluate.metrics))
    reference = Reference(
        features,
        extractor_name=extractor.name,
        extractor_digest=extractor.digest,
        images_digest=sha256_bytes(f"{images.reference_fingerprint} {indices_digest(indices)}".encode()),
        given_statistics=statistics,
    )
    assert reference.num_images == len(indices), (reference.num_images, len(indices))
    reference.save(out)
    return {
        "num_images": reference.num_images,
        "num_features": extractor.num_features,
        "shape": [images.channels, images.resolution, images.resolution],
    }


def _reduced(
    batches: Iterator[Features], *, keeps_features: bool
) -> tuple[Features, None] | tuple[None, FeatureStatistics]:
    if keeps_features:
        return np.concatenate(list(batches)), None
    return None, FeatureStatistics.from_batches(batches)
