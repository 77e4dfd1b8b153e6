"""The pretrained model theta_0, trained here."""

from pathlib import Path
from typing import Any

from deme_core.errors import InputError
from deme_core.families import Unconditional
from deme_core.model_folder import build_denoiser, write_model_folder
from deme_core.seeds import derive_seed
from deme_core.segments import TimestepSegment
from deme_core.timesteps import TimestepSampler
from deme_core.training import TrainingPlan
from tasks.jobs import PretrainJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.model_description import describe_model
from tasks.work.training_run import SPEED_ONLY, run_training


def identity(job: PretrainJob, context: JobContext) -> Identity:
    """Everything but what changes only the speed."""
    return Identity(
        settings={
            "unet": job.unet,
            "noise_scheduler": job.noise_scheduler,
            "training": job.training.model_dump(mode="json", exclude=SPEED_ONLY),
        },
        dataset=context.training_images(job.dataset).fingerprint,
    )


def run(job: PretrainJob, context: JobContext, out: Path, digest: str) -> Work:
    """Trains, and writes a diffusers folder with the EMA weights."""
    import torch
    from diffusers import DDPMScheduler

    images = context.training_images(job.dataset)
    fixed = {"sample_size": images.resolution, "in_channels": images.channels, "out_channels": images.channels}
    torch.manual_seed(derive_seed("initial weights", job.training.seed))
    try:
        model = build_denoiser({"_class_name": "UNet2DModel", **job.unet, **fixed})
        noise_scheduler = DDPMScheduler(**job.noise_scheduler)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"pretrained.unet or pretrained.noise_scheduler cannot be built: {error}.") from error
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    everything = TimestepSegment(0, num_train_timesteps)
    plan = TrainingPlan(
        label="pretraining",
        sampler=TimestepSampler(everything, num_train_timesteps),
        num_steps=job.training.num_steps,
        seed=job.training.seed,
    )
    adapter = Unconditional(denoiser_config=_config(model), scheduler_config=_config(noise_scheduler))
    tensors, metrics = yield from run_training(context, digest, model, adapter, images, job.dataset, job.training, plan)
    write_model_folder(
        out,
        denoiser_config={"_class_name": "UNet2DModel", **_config(model)},
        scheduler_config={"_class_name": "DDPMScheduler", **_config(noise_scheduler)},
        tensors=tensors,
    )
    return metrics | describe_model(out)


def _config(part: Any) -> dict[str, Any]:
    """Returns the settings of a diffusers model or scheduler."""
    return dict(part.config)
