"""Who takes part in `benchmarks.finetune_step`: diffusers' kinds of step, and DeMe's with each of its options."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from benchmarks.shapes import SHAPES, adapter_of, random_batch
from deme_core.families import Adapter, EncodedBatch
from deme_core.model_folder import build_denoiser
from deme_core.projection import attach_projections
from deme_core.recipe import FinetuneSpec
from deme_core.seeds import generator
from deme_core.segments import TimestepSegment
from deme_core.teacher import Teacher
from deme_core.timesteps import TimestepSampler
from deme_core.training import Training
from deme_core.training_plan import TrainingPlan

PLAIN, SCRIPT = "plain step", "training script, second forward pass"
OFF, ON = "DeMe, channel_projection off", "DeMe, channel_projection on"
_NEVER = 1_000_000
_SAMPLER = TimestepSampler(TimestepSegment(0, 250), 1000, 0.3)
# Each with all before it; keys of `finetune` in a recipe.
OPTIONS: dict[str, dict[str, Any]] = {
    "+ allow_tf32": {"allow_tf32": True},
    "+ bf16 autocast": {"mixed_precision": "bf16"},
    "+ channels_last": {"channels_last": True},
    "+ compile": {"compile": True},
}


@dataclass(frozen=True, eq=False)
class Problem:
    """What every contestant trains on.

    Attributes:
        model: theta_0.
        adapter: says how it is called.
        batch: always the same.
    """

    model: nn.Module
    adapter: Adapter
    batch: EncodedBatch

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.batch.latents.device


def build_problem(shape: str, *, tiny: bool, size: int | None, batch_size: int, device: str) -> Problem:
    """Returns a denoiser of a shape of `benchmarks.shapes` with random weights, and a batch."""
    config = SHAPES[shape](tiny=tiny) | ({"sample_size": size} if size else {})
    torch.manual_seed(0)
    with torch.device(device):  # A billion normal draws take a CPU a quarter of a minute.
        model = build_denoiser(config)
    latents, conditioning = random_batch(config, batch_size, device)
    return Problem(model, adapter_of(config), EncodedBatch(latents, conditioning))


def _draws(problem: Problem, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns noise and timesteps of a step: those that `Training` draws."""
    rng = generator("training", 0, number, device=problem.device)
    clean = problem.batch.latents
    return torch.randn(clean.shape, generator=rng, device=problem.device), _SAMPLER(len(clean), rng)


def plain_steps(problem: Problem) -> Iterator[float]:
    """Trains as diffusers' example does, without its optional parts; yields the loss."""
    model = copy.deepcopy(problem.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    process, batch = problem.adapter.noise_process, problem.batch
    for number in itertools.count():
        noise, timesteps = _draws(problem, number)
        noisy = process.add_noise(batch.latents, noise, timesteps)
        told = process.model_timesteps(timesteps)
        loss = F.mse_loss(problem.adapter.predict(model, noisy, told, batch.conditioning), noise)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def script_steps(problem: Problem) -> Iterator[float]:
    """Trains as diffusers' train_unconditional.py does, with a second forward pass; yields the diffusion loss."""
    accelerator = Accelerator(cpu=problem.device.type == "cpu")
    frozen = copy.deepcopy(problem.model).eval().requires_grad_(False)
    model = copy.deepcopy(problem.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    lr_scheduler = get_scheduler("constant", optimizer=optimizer)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    process, batch = problem.adapter.noise_process, problem.batch
    for number in itertools.count():
        with accelerator.accumulate(model):
            noise, timesteps = _draws(problem, number)
            noisy = process.add_noise(batch.latents, noise, timesteps)
            told = process.model_timesteps(timesteps)
            prediction = problem.adapter.predict(model, noisy, told, batch.conditioning)
            with torch.no_grad():
                taught = problem.adapter.predict(frozen, noisy, told, batch.conditioning)
            diffusion = F.mse_loss(prediction.float(), noise.float())
            accelerator.backward(diffusion + F.mse_loss(prediction.float(), taught.float()))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        ema.step(model.parameters())
        yield diffusion.item()


def build_training(problem: Problem, *, channel_projection: bool, **spec: Any) -> Training:
    """Returns a finetuning run as shipped, on one segment and always the same batch."""
    model = copy.deepcopy(problem.model)
    if channel_projection:
        attach_projections(model)
    batch_size = len(problem.batch)
    return Training(
        model,
        problem.adapter,
        lambda _first_batch: itertools.repeat(problem.batch),
        spec=FinetuneSpec(num_steps=_NEVER, batch_size=batch_size, checkpoint_every=_NEVER, **spec),
        plan=TrainingPlan("benchmark", _SAMPLER, _NEVER, 1.0),
        teacher=Teacher([copy.deepcopy(problem.model)]),
        device=problem.device,
        record_every=1,
    )


def deme_steps(problem: Problem, *, channel_projection: bool, **spec: Any) -> Iterator[float]:
    """Trains as DeMe does; yields the diffusion loss."""
    training = build_training(problem, channel_projection=channel_projection, **spec)
    return (progress.diffusion_loss for progress in training.progress())


def contestants_of(
    *, with_options: bool, left_out: Sequence[str] = ()
) -> dict[str, Callable[[Problem], Iterator[float]]]:
    """Returns who takes part."""
    known: dict[str, Callable[[Problem], Iterator[float]]] = {
        PLAIN: plain_steps,
        SCRIPT: script_steps,
        OFF: partial(deme_steps, channel_projection=False),
        ON: partial(deme_steps, channel_projection=True),
    }
    spec: dict[str, Any] = {}
    for name, option in OPTIONS.items() if with_options else ():
        if not option.keys() & set(left_out):
            spec |= option
            known[name] = partial(deme_steps, channel_projection=True, **spec)
    return known
