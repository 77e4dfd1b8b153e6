"""A finetuned copy whose task vector is confined to the inputs of its own segment: what RegMean merges."""

from pathlib import Path

from deme_core.checkpoint import Checkpoint
from deme_core.model_folder import load_denoiser
from deme_core.model_folder_writer import write_like
from deme_core.regmean import confine
from tasks.jobs import ConfineJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.grams import GRAMS


def identity(job: ConfineJob, context: JobContext) -> Identity:
    """Models and matrices."""
    return Identity(
        settings={"shrinkage": job.spec.shrinkage, "index": job.index},
        inputs={"pretrained": job.pretrained.digest, "expert": job.expert.digest}
        | {f"grams-{index}": grams.digest for index, grams in enumerate(job.grams)},
    )


def run(job: ConfineJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the confined copy, its projections folded in first."""
    yield {"message": "confining"}
    base = context.open_model(job.pretrained)
    grams = [Checkpoint(context.fetch(ref) / GRAMS) for ref in job.grams]
    tensors = confine(
        load_denoiser(base).state_dict(),
        load_denoiser(context.open_model(job.expert)).state_dict(),
        job.index,
        grams,
        shrinkage=job.spec.shrinkage,
    )
    write_like(out, base, tensors=tensors, copy_of=job.pretrained.digest)
    return {}
