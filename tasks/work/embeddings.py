"""The embeddings of a slice of a data set's distinct captions."""

from pathlib import Path

from deme_core.digests import json_digest
from deme_core.encodings import distinct_captions, write_embeddings
from deme_core.precision import DTYPES
from tasks.jobs import EmbeddingsJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.encodings import encoder_settings


def identity(job: EmbeddingsJob, context: JobContext) -> Identity:
    """The captions of the slice and the text encoders; the images are no part of it.

    Nor are the captions of other slices but for their number, which the first one tells.
    """
    distinct = _distinct(job, context)
    texts = distinct[job.low : job.high]
    settings = {
        **({"num_in_all": len(distinct)} if job.low == 0 else {}),
        "texts": json_digest(texts),
        **encoder_settings(job, context, "text_encoder", "tokenizer"),
    }
    return Identity(settings=settings)


def run(job: EmbeddingsJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the embeddings, and how many distinct captions there are in all slices."""
    distinct = _distinct(job, context)
    texts = distinct[job.low : job.high]
    adapter = context.open_model(job.pretrained).adapter(context.device)
    for count in write_embeddings(out, texts, adapter, dtype=DTYPES[job.dataset.cache_precision]):
        yield {"done": count, "total": len(texts)}
    return {"num_in_all": len(distinct), "num_bytes": sum(file.stat().st_size for file in out.iterdir())}


def _distinct(job: EmbeddingsJob, context: JobContext) -> list[str]:
    return distinct_captions(context.images(job.dataset).captions or ())
