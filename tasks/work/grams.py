"""Gram matrices of the inputs of a finetuned copy's linear maps, on its own segment."""

from pathlib import Path

from deme_core.activation_grams import input_grams
from deme_core.checkpoint import save_tensors
from deme_core.model_folder import load_denoiser
from deme_core.segments import TimestepSegment
from tasks.jobs import GramsJob
from tasks.work.base import Identity, JobContext, Work

GRAMS = "grams.safetensors"


def identity(job: GramsJob, context: JobContext) -> Identity:
    """Model, images and timesteps."""
    return Identity(
        settings={"segment": [job.low, job.high], **job.spec.model_dump(mode="json", exclude={"shrinkage"})},
        inputs={"expert": job.expert.digest},
        dataset=context.training_images(job.dataset).reference_fingerprint,
    )


def run(job: GramsJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the matrices, float32."""
    yield {"message": "measuring inputs"}
    folder = context.open_model(job.expert)
    grams = input_grams(
        load_denoiser(folder).eval().to(context.device),
        folder.adapter(context.device),
        context.training_images(job.dataset),
        segment=TimestepSegment(job.low, job.high),
        num_images=job.spec.num_images,
        max_features=job.spec.max_features,
        device=context.device,
    )
    save_tensors(out / GRAMS, {name: gram.float() for name, gram in grams.items()})
    return {"num_maps": len(grams)}
