"""Gram matrices of the inputs of a finetuned copy's linear maps, on its own segment."""

from pathlib import Path

from deme_core.activation_grams import input_grams, share_of
from deme_core.checkpoint import save_tensors
from deme_core.model_folder import load_denoiser
from deme_core.segments import TimestepSegment
from tasks.jobs import GramsJob
from tasks.work.base import Identity, JobContext, Work

GRAMS = "grams.safetensors"


def identity(job: GramsJob, context: JobContext) -> Identity:
    """Model, images with the conditions that the model sees beside them, and timesteps."""
    return Identity(
        settings={"segment": [job.low, job.high], **job.spec.model_dump(mode="json", exclude={"shrinkage"})},
        inputs={"expert": job.expert.digest},
        dataset=context.training_images(job.dataset).example_fingerprint,
    )


def run(job: GramsJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the matrices, float32."""
    yield {"message": "measuring inputs"}
    folder = context.open_model(job.expert)
    model = load_denoiser(folder).eval().to(context.device)
    grams = input_grams(
        model,
        folder.adapter(context.device),
        context.training_images(job.dataset),
        segment=TimestepSegment(job.low, job.high),
        num_images=job.spec.num_images,
        max_features=job.spec.max_features,
        device=context.device,
    )
    save_tensors(out / GRAMS, {name: gram.float() for name, gram in grams.items()})
    share = share_of(grams, model)
    yield {"message": f"{len(grams)} linear maps with {share:.0%} of the parameters are confined, the rest is averaged"}
    return {"num_maps": len(grams), "share_of_parameters": share}
