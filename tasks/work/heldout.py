"""The held-out denoising loss of one model, by timestep."""

from pathlib import Path

from deme_core.binned_losses import mean_loss, save_losses
from deme_core.heldout_loss import check_finite, heldout_losses
from deme_core.model_folder import load_denoiser
from tasks.jobs import HeldoutJob
from tasks.work.base import Identity, JobContext, Work


def identity(job: HeldoutJob, context: JobContext) -> Identity:
    """Model, images and bins."""
    return Identity(
        settings={"edges": list(job.edges)},
        inputs={"model": job.model.digest},
        dataset=context.heldout_images(job.dataset).example_fingerprint,
    )


def run(job: HeldoutJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the loss of every image in every bin."""
    yield {"message": "measuring the held-out loss"}
    folder = context.open_model(job.model)
    model = load_denoiser(folder).eval().to(context.device)
    losses = heldout_losses(
        model,
        folder.adapter(context.device),
        context.heldout_images(job.dataset),
        edges=job.edges,
        device=context.device,
    )
    check_finite(losses, job.model.uri)
    save_losses(out, losses)
    return {
        "edges": list(job.edges),
        "mean": mean_loss(losses, job.edges),
        "bins": losses.mean(axis=0, dtype="float64").tolist(),
        "num_images": len(losses),
    }
