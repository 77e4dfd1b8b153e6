"""The reference: what the scores need of the real images' features, read slice by slice."""

from pathlib import Path

from deme_core.digests import sha256_bytes
from deme_core.extractors import JointExtractor
from deme_core.feature_file import read_features
from deme_core.feature_statistics import FeatureStatistics
from deme_core.metrics import keeps_features, needs_features
from deme_core.reference import Reference, save_reference
from tasks.jobs import ReferenceJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.real_features import extractor_digest, extractor_of, indices_digest, real_indices


def identity(job: ReferenceJob, context: JobContext) -> Identity:
    """The real images that are used, and the extractor; how they were sliced is no part of it."""
    indices = real_indices(job, context)
    return Identity(
        settings={
            "indices": indices_digest(indices),
            "extractor": extractor_digest(job.evaluate, context),
            "keeps_features": _keeps_features(job, len(indices)),
        },
        dataset=context.images(job.dataset).reference_fingerprint,
    )


def run(job: ReferenceJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the features, of very many images mean and covariance; those of at most 1024 images are in memory."""
    images, extractor = context.images(job.dataset), extractor_of(job.evaluate, context)
    indices = real_indices(job, context)
    batches = read_features([context.fetch(ref) for ref in job.features])
    yield {"done": 0, "total": len(indices)}
    widths = extractor.widths if isinstance(extractor, JointExtractor) else ()
    names = {
        "extractor_name": extractor.name,
        "extractor_digest": extractor.digest,
        "images_digest": sha256_bytes(f"{images.reference_fingerprint} {indices_digest(indices)}".encode()),
    }
    if _keeps_features(job, len(indices)):
        save_reference(out, batches, num_images=len(indices), widths=widths, **names)
    else:
        statistics = FeatureStatistics.from_batches(batches)
        assert statistics.num_images == len(indices), (statistics.num_images, len(indices))
        Reference(None, **names, widths=widths, given_statistics=statistics).save(out)
    return {
        "num_images": len(indices),
        "num_features": max(widths, default=extractor.num_features),
        "shape": [images.channels, images.resolution, images.resolution],
    }


def _keeps_features(job: ReferenceJob, num_images: int) -> bool:
    metrics = job.evaluate.metrics
    return keeps_features(metrics, num_images) if job.part == "report" else needs_features(metrics)
