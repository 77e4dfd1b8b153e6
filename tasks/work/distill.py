"""The distilled model: the merge, trained a little further to predict what the ensemble predicts."""

import itertools
from pathlib import Path

from deme_core.model_folder import load_denoiser
from deme_core.model_folder_writer import write_like
from deme_core.seeds import derive_seed
from deme_core.segments import TimestepSegment
from deme_core.teacher import Teacher
from deme_core.timesteps import TimestepSampler
from deme_core.training_plan import SPEED_ONLY, TrainingPlan
from tasks.jobs import DistillJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.encodings import open_encodings
from tasks.work.model_description import describe_model


def identity(job: DistillJob, context: JobContext) -> Identity:
    """Everything but the label and what changes only the speed."""
    cached = {"cache_precision": job.dataset.cache_precision} if job.latents else {}
    return Identity(
        settings={
            "distill": job.distill.model_dump(mode="json", exclude=SPEED_ONLY),
            "segment_edges": list(job.segment_edges),
            **cached,
        },
        inputs={"merged": job.merged.digest} | {f"expert-{i}": expert.digest for i, expert in enumerate(job.experts)},
        dataset=context.training_images(job.dataset).fingerprint,
    )


def run(job: DistillJob, context: JobContext, out: Path, digest: str) -> Work:
    """Distills, and writes the EMA weights as a folder that stock diffusers loads."""
    from tasks.work.training_run import run_training  # Seconds of imports, for what is not in the store alone.

    folder = context.open_model(job.merged)
    segments = [TimestepSegment(*pair) for pair in itertools.pairwise(job.segment_edges)]
    everything = TimestepSegment(job.segment_edges[0], job.segment_edges[-1])
    plan = TrainingPlan(
        label=job.label,
        sampler=TimestepSampler(everything, everything.high, 0.0),
        num_steps=job.distill.num_steps,
        diffusion_weight=0.0,
        consistency_weight=1.0,
        seed=derive_seed("distill", job.distill.seed),
    )
    tensors, metrics = yield from run_training(
        context,
        digest,
        model=load_denoiser(folder),
        adapter=folder.adapter(context.device),
        dataset=job.dataset,
        spec=job.distill,
        plan=plan,
        teacher=Teacher([load_denoiser(context.open_model(expert)) for expert in job.experts], segments),
        encodings=open_encodings(job, context),
    )
    write_like(out, folder, tensors=tensors)
    return metrics | {"weights_digest": describe_model(out)["weights_digest"]}
