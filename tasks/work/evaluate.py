"""The evaluation of one row under one sampling seed."""

from pathlib import Path

from deme_core.figures import save_image_grid
from deme_core.generate import Denoiser, Ensemble, SingleModel
from deme_core.model_folder import load_unet, open_model_folder
from deme_core.segments import TimestepSegment
from tasks.jobs import EvaluateJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.scoring import build_evaluation

NUM_SAMPLES_SHOWN = 64


def identity(job: EvaluateJob, context: JobContext) -> Identity:
    """Models, seed, real images, sampling and metrics; the other seeds are no part of it."""
    inputs = {f"model-{index}": model.digest for index, model in enumerate(job.models)}
    excluded = {"seeds", "batch_size", "num_reference_images"}
    return Identity(
        settings={
            "edges": job.edges,
            "seed": job.seed,
            "evaluate": job.evaluate.model_dump(mode="json", exclude=excluded),
        },
        inputs=inputs | {"reference": job.reference.digest},
    )


def run(job: EvaluateJob, context: JobContext, out: Path, digest: str) -> Work:
    """Generates and scores the images; keeps the first of them as a grid."""
    folders = [open_model_folder(context.fetch(model)) for model in job.models]
    networks = [load_unet(folder).eval().to(context.device) for folder in folders]
    evaluation = build_evaluation(
        context, job.evaluate, model=folders[0], reference=job.reference, num_images=job.evaluate.num_images
    )
    denoiser: Denoiser = SingleModel(networks[0])
    if job.edges is not None:
        segments = [TimestepSegment(*pair) for pair in zip(job.edges, job.edges[1:], strict=False)]
        denoiser = Ensemble(segments, networks)
    yield {"done": 0, "total": job.evaluate.num_images}
    scores, images = evaluation.score(denoiser, job.seed, keep=NUM_SAMPLES_SHOWN)
    save_image_grid(images, out / "samples.png")
    yield {"done": job.evaluate.num_images, "total": job.evaluate.num_images}
    return {"scores": scores, "seed": job.seed, "conditions": evaluation.conditions()}
