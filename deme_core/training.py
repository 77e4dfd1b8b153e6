"""Training: one model trained over one range of timesteps, resumable at every optimizer step.

Pretraining, the N copies and the control are all this, with other settings. Every random draw is seeded by
(seed, number of the forward pass), so a resumed run equals an uninterrupted one without saving any RNG.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from deme_core.data_parallel import current_share
from deme_core.errors import FrozenModelChangedError, NonFiniteLossError
from deme_core.families import Adapter, EncodedBatch
from deme_core.lora import LoraTeacher, is_lora
from deme_core.objectives import consistency_loss, diffusion_loss
from deme_core.optimizer import build_optimizer
from deme_core.recipe import TrainingSpec
from deme_core.seeds import derive_seed, generator
from deme_core.teacher import Teacher
from deme_core.timesteps import check_histogram
from deme_core.training_plan import TrainingPlan
from deme_core.typed_norms import normalize_in_type

# Tensors while training, floats in a record.
T = TypeVar("T", torch.Tensor, float)

BatchSource = Callable[[int], Iterable[EncodedBatch]]


@dataclass(frozen=True)
class TrainingProgress:
    """Means over the optimizer steps since the record before.

    Attributes:
        global_step: optimizer steps done.
        num_steps: optimizer steps in all.
        loss: diffusion_weight * diffusion loss + consistency_weight * consistency loss.
        diffusion_loss: mean squared error against the training target, which is the teacher's prediction where a plan
            replays it; weighted where a plan says so.
        consistency_loss: mean squared error against the teacher's prediction; 0 without one.
        learning_rate: of the last step.
        grad_norm: L2 norm before clipping, of the steps at which it was finite: fp16's gradient scaler skips all
            others; 0 if it skipped every step.
        images_per_sec: training images per second.
        gpu_memory_gb: peak of allocated GPU memory, 10^9 bytes; 0 on CPU.
    """

    global_step: int
    num_steps: int
    loss: float
    diffusion_loss: float
    consistency_loss: float
    learning_rate: float
    grad_norm: float
    images_per_sec: float
    gpu_memory_gb: float


@dataclass
class _Sums:
    """Losses and norms since the last record, kept on the device to avoid a wait per step."""

    steps: list[torch.Tensor] = field(default_factory=list)
    num_images: int = 0
    learning_rate: float = 0.0
    started: float = field(default_factory=time.perf_counter)


class _MovingAverage(EMAModel):
    """diffusers' moving average, updated in one pass over the parameters and without a copy of them."""

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Moves the average towards ``parameters``: shadow <- shadow + (1 - decay) (parameters - shadow)."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)


def _arrange(model: nn.Module, spec: TrainingSpec) -> None:
    """Orders and compiles a model as ``spec`` says; names and shapes of its tensors stay."""
    if spec.mixed_precision == "bf16":  # Not fp16: a sum over two feature maps may not fit.
        normalize_in_type(model)
    if spec.channels_last:
        model.to(memory_format=torch.channels_last)
    if spec.compile:
        model.compile()  # In place: a module that wraps it would rename every parameter.


def _drop_variables_of_accelerate() -> None:
    """Takes out of the environment what accelerate would read as settings of a training, and no digest tells of.

    For good, since it reads some at every step. Worker processes have none (`tasks.worker_process`).
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


@contextmanager
def matrix_precision(*, allow_tf32: bool) -> Iterator[None]:
    """Lets a GPU multiply float32 matrices in TF32 while the context lasts; a process trains several models in turn."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allow_tf32 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Training:
    """A training run: build it, optionally ``restore`` a checkpoint, iterate ``progress``, take ``averaged``.

    Args:
        model: the model to train, on the CPU or already on ``device``; it is changed, but for what asks no gradient.
        adapter: says how the model is noised and called, and what its target is.
        batches: from the number of the first batch, an endless stream of what the denoiser is trained on.
        spec: optimizer, precision, EMA and the like.
        plan: timesteps, number of steps, weights of the losses.
        teacher: frozen theta_0, or frozen experts; needed if the plan has something learnt from it.
        device: where to train.
        record_every: optimizer steps between progress records.
        should_stop: asked after every step; once it says yes there is a record, for a checkpoint to be made.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        batches: BatchSource,
        *,
        spec: TrainingSpec,
        plan: TrainingPlan,
        teacher: Teacher | LoraTeacher | None = None,
        device: torch.device | str = "cpu",
        record_every: int = 10,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if (teacher is None) == plan.has_teacher:
            raise ValueError("a teacher and what is learnt from it go together")
        AcceleratorState._reset_state(reset_partial_state=True)  # A worker process trains several models in turn.
        _drop_variables_of_accelerate()
        self.accelerator = Accelerator(
            mixed_precision="no" if spec.mixed_precision == "fp32" else spec.mixed_precision,
            gradient_accumulation_steps=spec.gradient_accumulation_steps,
            cpu=torch.device(device).type == "cpu",
        )
        self.spec, self.plan, self.batches, self.record_every = spec, plan, batches, record_every
        self.should_stop = should_stop
        self.adapter = adapter
        adapter.prepare_training(model)
        self.device = self.accelerator.device
        self.share = current_share()
        self.teacher = teacher.to(self.device) if teacher is not None else None
        if spec.gradient_checkpointing:
            cast(Any, model).enable_gradient_checkpointing()  # diffusers' own, which torch does not declare.
        for trained_or_frozen in (model, *(self.teacher.models if self.teacher is not None else ())):
            _arrange(trained_or_frozen, spec)
        model.to(self.device).train()
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = build_optimizer(self.trained.values(), spec)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.lr_scheduler = get_scheduler(
            spec.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=spec.lr_warmup_steps,
            num_training_steps=plan.num_steps,
        )
        self.ema = _MovingAverage(
            self.trained.values(),
            decay=spec.ema_decay,
            use_ema_warmup=True,
            inv_gamma=spec.ema_inv_gamma,
            power=spec.ema_power,
        )
        self.global_step = 0
        # On the device: to count on the CPU would be to wait for the device at every step.
        self.timestep_counts = torch.zeros(plan.sampler.num_train_timesteps, dtype=torch.int64, device=self.device)

    def progress(self) -> Iterator[TrainingProgress]:
        """Trains to the end, yielding a record every ``record_every`` steps, at checkpoints and at the end.

        Whoever iterates may stop at any record: what a checkpoint then holds is the state after that step.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite, or a gradient that no scaler skips; raised before such a
                state could be saved.
            TimestepHistogramError: the timesteps drawn contradict the sampler.
            FrozenModelChangedError: the teacher is not what it was at the start.
        """
        with matrix_precision(allow_tf32=self.spec.allow_tf32):
            yield from self._progress()

    def _progress(self) -> Iterator[TrainingProgress]:
        frozen_digests = self.teacher.digests() if self.teacher is not None else None
        first_batch = self.global_step * self.spec.gradient_accumulation_steps
        batches = enumerate(self.batches(first_batch), start=first_batch)
        sums = _Sums()
        while self.global_step < self.plan.num_steps:
            sums.steps.append(self._optimizer_step(batches, sums))
            self.global_step += 1
            if self._record_is_due() or self.should_stop():
                yield self._record(sums)
                sums = _Sums()
        batch_size = self.spec.batch_size * self.share.num_processes
        draws_per_decision = batch_size if self.plan.sampler.per_batch_mirrored else 1
        check_histogram(self.timestep_counts.cpu(), self.plan.sampler, draws_per_decision=draws_per_decision)
        if self.teacher is not None and self.teacher.digests() != frozen_digests:
            raise FrozenModelChangedError(f"A frozen model changed while {self.plan.label} was trained.")

    def _record_is_due(self) -> bool:
        step = self.global_step
        return step % self.record_every == 0 or step % self.spec.checkpoint_every == 0 or step == self.plan.num_steps

    def _optimizer_step(self, batches: Iterator[tuple[int, EncodedBatch]], sums: _Sums) -> torch.Tensor:
        """Returns diffusion loss, consistency loss and gradient norm, float32 (3,), on the device."""
        losses = torch.zeros(2, device=self.device)
        grad_norm = torch.zeros((), device=self.device)
        accumulation = self.spec.gradient_accumulation_steps
        for _ in range(accumulation):
            number, batch = next(batches)
            with self.accelerator.accumulate(self.model):
                diffusion, consistency = self._losses(number, batch.to(self.device))
                self.accelerator.backward(self._weighted(diffusion, consistency))
                if self.accelerator.sync_gradients:
                    grad_norm = self.accelerator.clip_grad_norm_(self.trained.values(), self.spec.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses += torch.stack([diffusion.detach(), consistency.detach()]) / accumulation
            sums.num_images += len(batch) * self.share.num_processes
        sums.learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        self.ema.step(self.trained.values())
        return torch.cat([losses, grad_norm[None]])

    def _losses(self, number: int, batch: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        clean, process = batch.latents, self.adapter.noise_process
        rng = generator("training", self.plan.seed, number, device=self.device)
        rank = (self.share.rank,) if self.share.rank else ()
        torch.manual_seed(derive_seed("dropout", self.plan.seed, number, *rank))
        num_images = len(batch) * self.share.num_processes
        noise = self.share.of(torch.randn(num_images, *clean.shape[1:], generator=rng, device=self.device))
        timesteps = self.plan.sampler(num_images, rng)
        self.timestep_counts.index_add_(0, timesteps, torch.ones_like(timesteps))
        timesteps = self.share.of(timesteps)
        noisy, target = process.add_noise(clean, noise, timesteps), process.target(clean, noise, timesteps)
        told = process.model_timesteps(timesteps)
        taught = None
        if self.teacher is not None:  # First: the memory that it takes for a moment is free again for the model's pass.
            with self.accelerator.autocast():
                taught = self.teacher.predict(self.adapter, noisy, timesteps, batch.conditioning)
        prediction = self.adapter.predict(self.model, noisy, told, batch.conditioning)
        if taught is not None and self.plan.replay_from_teacher:
            inside = self.plan.sampler.segment.holds(timesteps).view(-1, *[1] * (target.ndim - 1))
            target = torch.where(inside, target, taught.to(target.dtype))
        gamma = self.plan.min_snr_gamma
        diffusion = diffusion_loss(
            prediction, target, None if gamma is None else process.min_snr_weights(timesteps, gamma)
        )
        consistency = torch.zeros_like(diffusion) if taught is None else consistency_loss(prediction, taught)
        return diffusion, consistency

    def _weighted(self, diffusion: T, consistency: T) -> T:
        return self.plan.diffusion_weight * diffusion + self.plan.consistency_weight * consistency

    def _record(self, sums: _Sums) -> TrainingProgress:
        # Shares are of one size: the mean of their means is that of the whole batch.
        values = cast(torch.Tensor, self.accelerator.reduce(torch.stack(sums.steps), reduction="mean")).cpu()
        finite = values.isfinite()
        # fp16's scaler skips a step whose gradients overflow; any other step they ruin.
        sound = (finite if self.accelerator.scaler is None else finite[:, :2]).all(dim=1)
        if not sound.all():
            first = int((~sound).nonzero()[0])
            raise NonFiniteLossError(self.plan.label, self.global_step - len(values) + first + 1)
        counts = finite.sum(dim=0).clamp(min=1)
        diffusion, consistency, grad_norm = (torch.where(finite, values, 0.0).sum(dim=0) / counts).tolist()
        on_gpu = self.device.type == "cuda"
        return TrainingProgress(
            global_step=self.global_step,
            num_steps=self.plan.num_steps,
            loss=self._weighted(diffusion, consistency),
            diffusion_loss=diffusion,
            consistency_loss=consistency,
            learning_rate=sums.learning_rate,
            grad_norm=grad_norm,
            images_per_sec=sums.num_images / (time.perf_counter() - sums.started),
            gpu_memory_gb=torch.cuda.max_memory_allocated(self.device) / 1e9 if on_gpu else 0.0,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns parameters and buffers by name; of a model with a LoRA without what is frozen, its base."""
        model = self.accelerator.unwrap_model(self.model)
        has_lora = any(is_lora(name) for name in self.trained)
        base = {name for name, _ in model.named_parameters() if has_lora and name not in self.trained}
        return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in base}

    def averaged_tensors(self) -> dict[str, torch.Tensor]:
        """Returns `tensors`, the EMA in the place of what is trained: what is merged.

        Raises:
            KeyError: what is trained has other names, as where something wraps the model: no average would be stored.
        """
        averages, tensors = dict(zip(self.trained, self.ema.shadow_params, strict=True)), self.tensors()
        if missing := averages.keys() - tensors.keys():
            raise KeyError(*sorted(missing))
        return {name: averages.get(name, tensor).detach().clone() for name, tensor in tensors.items()}
