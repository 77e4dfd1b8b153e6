"""The latents of a slice of a data set."""

from pathlib import Path

from deme_core.encodings import write_latents
from deme_core.precision import DTYPES
from tasks.jobs import LatentsJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.encodings import encoder_settings


def identity(job: LatentsJob, context: JobContext) -> Identity:
    """The images of the slice, mirrored or not, and the autoencoder."""
    images = context.images(job.dataset)
    settings = {
        "slice": [job.low, min(job.high, len(images))],
        "mirrored": job.dataset.random_flip,
        **encoder_settings(job, context, "vae/"),
    }
    return Identity(settings=settings, dataset=images.reference_fingerprint)


def run(job: LatentsJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the latents, and how many images there are in all slices."""
    images = context.images(job.dataset)
    high = min(job.high, len(images))
    done = write_latents(
        out,
        images,
        context.open_model(job.pretrained).adapter(context.device),
        low=job.low,
        high=high,
        mirrored=job.dataset.random_flip,
        dtype=DTYPES[job.dataset.cache_precision],
    )
    for count in done:
        yield {"done": count, "total": high - job.low}
    return {"num_in_all": len(images), "num_bytes": sum(file.stat().st_size for file in out.iterdir())}
