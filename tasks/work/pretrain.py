"""The pretrained model theta_0, trained here."""

from pathlib import Path
from typing import Any

import torch

from deme_core.data_parallel import agree, current_share
from deme_core.errors import InputError
from deme_core.families import Unconditional
from deme_core.images import ImageSubset
from deme_core.model_folder import ModelFolder, build_denoiser, load_denoiser, open_model_folder
from deme_core.model_folder_writer import write_like, write_model_folder
from deme_core.seeds import derive_seed
from deme_core.segments import TimestepSegment
from deme_core.timesteps import TimestepSampler
from deme_core.training_plan import SPEED_ONLY, TrainingPlan
from deme_core.untrained_parts import untrained_scheduler, untrained_unet
from deme_core.untrained_text_model import write_untrained_text_model
from tasks.jobs import PretrainJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.check import check
from tasks.work.model_description import describe_model


def identity(job: PretrainJob, context: JobContext) -> Identity:
    """Everything but what changes only the speed, and what it will have to do."""
    text = {} if job.text_encoder is None else {"text_encoder": job.text_encoder}
    return Identity(
        settings={
            "unet": job.unet,
            "noise_scheduler": job.noise_scheduler,
            "training": job.training.model_dump(mode="json", exclude=SPEED_ONLY),
            **text,
        },
        dataset=context.training_images(job.dataset).fingerprint,
    )


def run(job: PretrainJob, context: JobContext, out: Path, digest: str) -> Work:
    """Trains, and writes a diffusers folder with the EMA weights."""
    from tasks.work.training_run import run_training  # Seconds of imports, for what is not in the store alone.

    images = context.training_images(job.dataset)
    with context.scratch_folder() as scratch:
        # One folder for all processes: transformers writes weights in the first of them only.
        written = _write_untrained(job, images, scratch).path if current_share().rank == 0 else scratch
        folder = open_model_folder(agree(written))
        if job.demands is not None:
            check(folder.adapter(), job.demands)
        everything = TimestepSegment(0, folder.num_train_timesteps)
        plan = TrainingPlan(
            label="pretraining",
            sampler=TimestepSampler(everything, folder.num_train_timesteps),
            num_steps=job.training.num_steps,
            seed=job.training.seed,
        )
        tensors, metrics = yield from run_training(
            context,
            digest,
            model=load_denoiser(folder),
            adapter=folder.adapter(context.device),
            dataset=job.dataset,
            spec=job.training,
            plan=plan,
        )
        write_like(out, folder, tensors=tensors)
    return metrics | describe_model(out)


def _write_untrained(job: PretrainJob, images: ImageSubset, path: Path) -> ModelFolder:
    """Writes the model that the training starts from.

    Raises:
        InputError: it cannot be built, or takes text where images have none.
    """
    if job.text_encoder is not None:
        if images.captions is None:
            raise InputError(
                "pretrained.text_encoder is that of a model that takes text, and the images have none; set "
                "dataset.caption_column or dataset.caption_template."
            )
        return write_untrained_text_model(
            path,
            unet=job.unet,
            noise_scheduler=job.noise_scheduler,
            text_encoder=job.text_encoder,
            captions=images.captions,
            image_shape=(images.channels, images.resolution, images.resolution),
            seed=job.training.seed,
        )
    fixed = {"sample_size": images.resolution, "in_channels": images.channels, "out_channels": images.channels}
    torch.manual_seed(derive_seed("initial weights", job.training.seed))
    try:
        model: Any = build_denoiser(untrained_unet("UNet2DModel", job.unet, fixed))
    except InputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, ImportError) as error:
        raise InputError(f"pretrained.unet cannot be built: {error}.") from error
    noise_scheduler = untrained_scheduler(job.noise_scheduler, Unconditional)
    write_model_folder(
        path,
        denoiser_config={"_class_name": "UNet2DModel", **model.config},
        scheduler_config={"_class_name": "DDPMScheduler", **noise_scheduler.config},
        tensors=model.state_dict(),
    )
    return open_model_folder(path)
