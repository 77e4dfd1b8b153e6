"""Generation: images from initial noise that depends on (seed, image index) and on nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from deme_core.errors import NonFiniteImagesError
from deme_core.seeds import generator
from deme_core.segments import TimestepSegment


class Denoiser(Protocol):
    """Anything that predicts from noisy images (B, C, H, W) at one timestep, in the same shape."""

    def __call__(self, noisy_images: torch.Tensor, timestep: int) -> torch.Tensor:
        """Returns the prediction."""


@dataclass(frozen=True)
class SingleModel:
    """One denoising model for all timesteps."""

    model: nn.Module

    def __call__(self, noisy_images: torch.Tensor, timestep: int) -> torch.Tensor:
        """Returns the model's prediction."""
        return self.model(noisy_images, timestep).sample


@dataclass(frozen=True)
class Ensemble:
    """The copies before merging: at timestep t the expert of t's segment denoises (METHOD section 3)."""

    segments: Sequence[TimestepSegment]
    experts: Sequence[nn.Module]

    def __call__(self, noisy_images: torch.Tensor, timestep: int) -> torch.Tensor:
        """Returns the prediction of the expert of ``timestep``'s segment."""
        for segment, expert in zip(self.segments, self.experts, strict=True):
            if timestep in segment:
                return expert(noisy_images, timestep).sample
        raise ValueError(f"timestep {timestep} is in none of the segments {[str(s) for s in self.segments]}")


@dataclass(frozen=True)
class Sampling:
    """How images are sampled: the part of the evaluation that every row shares.

    Attributes:
        sampler: ddim or ddpm.
        num_inference_steps: sampling steps.
        eta: noise of DDIM; 0 is deterministic.
        timestep_spacing: None keeps the scheduler config's.
        batch_size: images per batch; changes the speed only.
    """

    sampler: Literal["ddim", "ddpm"] = "ddim"
    num_inference_steps: int = 50
    eta: float = 0.0
    timestep_spacing: str | None = None
    batch_size: int = 64

    def build_scheduler(self, scheduler_config: Mapping[str, Any]) -> Any:
        """Returns the diffusers scheduler, its timesteps set."""
        from diffusers import DDIMScheduler, DDPMScheduler

        overrides = {"timestep_spacing": self.timestep_spacing} if self.timestep_spacing else {}
        scheduler_class = DDIMScheduler if self.sampler == "ddim" else DDPMScheduler
        scheduler = scheduler_class.from_config(dict(scheduler_config), **overrides)
        scheduler.set_timesteps(self.num_inference_steps)
        return scheduler


def image_shape(unet_config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Returns (C, H, W) of the images a denoiser makes."""
    size = unet_config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return unet_config["in_channels"], height, width


def initial_noise(
    seed: int, indices: Sequence[int], shape: Sequence[int]
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Returns noise (B, C, H, W) for the images ``indices``, and each image's generator for later noise."""
    generators = [generator("image", seed, index) for index in indices]
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]), generators


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    scheduler_config: Mapping[str, Any],
    sampling: Sampling,
    *,
    shape: Sequence[int],
    seed: int,
    indices: Sequence[int],
    device: torch.device | str = "cpu",
) -> Iterator[torch.Tensor]:
    """Yields the images ``indices`` of the set that ``seed`` names, batch by batch.

    Args:
        denoiser: what predicts.
        scheduler_config: the model's scheduler_config.json.
        sampling: sampler and its settings.
        shape: (C, H, W) of an image.
        seed: names the set of images.
        indices: which images of the set.
        device: where the denoiser is.

    Yields:
        uint8 (B, C, H, W), on the CPU, quantised as diffusers' pipelines do.

    Raises:
        NonFiniteImagesError: an image is NaN or infinite.
    """
    scheduler = sampling.build_scheduler(scheduler_config)
    extra = {"eta": sampling.eta} if sampling.sampler == "ddim" else {}
    for start in range(0, len(indices), sampling.batch_size):
        images, generators = initial_noise(seed, indices[start : start + sampling.batch_size], shape)
        images = images.to(device) * scheduler.init_noise_sigma
        finite = images.new_ones(len(images), dtype=torch.bool)
        for timestep in scheduler.timesteps.tolist():
            prediction = denoiser(images, timestep)
            finite &= _are_finite(prediction)  # A scheduler that clips would hide it.
            images = scheduler.step(prediction, timestep, images, generator=generators, **extra).prev_sample
        _check_finite(finite & _are_finite(images), seed)
        yield quantize(images)


def _are_finite(images: torch.Tensor) -> torch.Tensor:
    return images.isfinite().flatten(1).all(dim=1)


def _check_finite(finite: torch.Tensor, seed: int) -> None:
    # Quantised, the others would be black or white, and get a score.
    if num_bad := int((~finite).sum()):
        raise NonFiniteImagesError(
            f"{num_bad} of {len(finite)} images generated under seed {seed} are NaN or infinite, so the model has "
            "diverged; train it with a lower learning rate, or merge with smaller weights."
        )


def quantize(images: torch.Tensor) -> torch.Tensor:
    """Returns images in [-1, 1] as uint8 on the CPU."""
    return (images / 2 + 0.5).clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
