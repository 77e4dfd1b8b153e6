"""Whether a model can do what a recipe asks of it, as far as its configs tell."""

from pathlib import Path

import torch

from deme_core.families import Adapter
from deme_core.sampling import Sampling
from tasks.jobs import CheckJob, Demands
from tasks.work.base import Identity, JobContext, Work

# Of `EvaluateSpec`, what images are made by.
SAMPLING = {"sampler", "num_inference_steps", "eta", "timestep_spacing", "guidance_scale", "mixed_precision"}


def identity(job: CheckJob, context: JobContext) -> Identity:
    """The model, and what is asked of it."""
    return Identity(
        settings={
            "samplings": [evaluate.model_dump(mode="json", include=SAMPLING) for evaluate in job.demands.samplings],
            "min_snr": bool(job.demands.min_snr_gammas),
        },
        inputs={"pretrained": job.pretrained.digest},
    )


def run(job: CheckJob, context: JobContext, out: Path, digest: str) -> Work:
    """Leaves nothing but the word that all is well."""
    yield {"message": "looking at the model's configs"}
    check(context.open_model(job.pretrained).adapter(), job.demands)
    return {}


def check(adapter: Adapter, demands: Demands) -> None:
    """Raises an InputError if images cannot be made so, or losses not be weighed so."""
    for evaluate in demands.samplings:
        Sampling.of(evaluate).build_scheduler(adapter)
    for gamma in demands.min_snr_gammas:
        adapter.noise_process.min_snr_weights(torch.zeros(1, dtype=torch.int64), gamma)
