"""One finetuned copy: of a timestep segment, or of all timesteps (the control)."""

from pathlib import Path

from deme_core.lora import LoraTeacher, attach_lora, trained_factors
from deme_core.model_digest import tensors_digest
from deme_core.model_folder import load_denoiser
from deme_core.model_folder_writer import write_like, write_lora_copy
from deme_core.projection import attach_projections
from deme_core.seeds import derive_seed
from deme_core.segments import TimestepSegment
from deme_core.teacher import Teacher
from deme_core.timesteps import TimestepSampler
from deme_core.training_plan import SPEED_ONLY, TrainingPlan
from tasks.jobs import FinetuneJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.encodings import open_encodings


def identity(job: FinetuneJob, context: JobContext) -> Identity:
    """Everything but the label and what changes only the speed."""
    # What was encoded, and how, follows from the data set and the model; how it was sliced changes nothing.
    cached = {"cache_precision": job.dataset.cache_precision} if job.latents else {}
    return Identity(
        settings={
            "finetune": job.finetune.model_dump(mode="json", exclude={*SPEED_ONLY, "num_steps"}),
            "segment": [job.low, job.high],
            "num_steps": job.num_steps,
            **cached,
        },
        inputs={"pretrained": job.pretrained.digest},
        dataset=context.training_images(job.dataset).fingerprint,
    )


def run(job: FinetuneJob, context: JobContext, out: Path, digest: str) -> Work:
    """Finetunes, and writes the EMA weights with their projections beside the stock tensors, or the LoRA adapter."""
    from tasks.work.training_run import run_training  # Seconds of imports, for what is not in the store alone.

    folder = context.open_model(job.pretrained)
    model, lora = load_denoiser(folder), job.finetune.lora
    plan = TrainingPlan(
        label=job.label,
        sampler=TimestepSampler(
            TimestepSegment(job.low, job.high),
            folder.num_train_timesteps,
            job.finetune.global_sampling_probability,
            per_batch_mirrored=job.finetune.timestep_sampling == "per_batch_mirrored",
        ),
        num_steps=job.num_steps,
        consistency_weight=job.finetune.consistency_weight,
        replay_from_teacher=job.finetune.replay == "pretrained",
        min_snr_gamma=job.finetune.min_snr_gamma,
        seed=derive_seed("segment", job.finetune.seed, job.low, job.high),
    )
    if lora is not None:
        attach_lora(model, lora, seed=derive_seed("lora", plan.seed))
    elif job.finetune.channel_projection:
        attach_projections(model)
    teacher: Teacher | LoraTeacher | None = None
    if job.finetune.has_teacher:
        teacher = LoraTeacher(model) if lora is not None else Teacher([load_denoiser(folder)])
    tensors, metrics = yield from run_training(
        context,
        digest,
        model=model,
        adapter=folder.adapter(context.device),
        dataset=job.dataset,
        spec=job.finetune,
        plan=plan,
        teacher=teacher,
        encodings=open_encodings(job, context),
    )
    if lora is not None:
        write_lora_copy(out, folder, trained_factors(tensors, lora), copy_of=job.pretrained.digest)
    else:
        write_like(out, folder, tensors=tensors, copy_of=job.pretrained.digest)
    return metrics | {"pretrained_weights": tensors_digest(folder.checkpoint().tensors())}
