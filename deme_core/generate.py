"""Generation: images from initial noise that depends on (seed, image index) and on nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from deme_core.errors import NonFiniteImagesError
from deme_core.families import Adapter
from deme_core.guidance import image_guidance
from deme_core.prompts import Prompts
from deme_core.sampling import Sampling
from deme_core.seeds import generator
from deme_core.segments import TimestepSegment, segment_index


class Denoiser(Protocol):
    """Which model denoises at which timestep."""

    def model_at(self, timestep: int) -> nn.Module:
        """Returns the model that denoises at ``timestep``, in [0, T)."""


@dataclass(frozen=True)
class SingleModel:
    """One denoising model for all timesteps."""

    model: nn.Module

    def model_at(self, timestep: int) -> nn.Module:
        """Returns the model."""
        return self.model


@dataclass(frozen=True)
class Ensemble:
    """The copies before merging: at timestep t the expert of t's segment denoises (METHOD section 3)."""

    segments: Sequence[TimestepSegment]
    experts: Sequence[nn.Module]

    def model_at(self, timestep: int) -> nn.Module:
        """Returns the expert of ``timestep``'s segment."""
        return self.experts[segment_index(self.segments, timestep)]


def initial_noise(
    seed: int, indices: Sequence[int], shape: Sequence[int]
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Returns noise (B, C, H, W) for the images ``indices``, and each image's generator for later noise."""
    generators = [generator("image", seed, index) for index in indices]
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]), generators


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    adapter: Adapter,
    sampling: Sampling,
    *,
    seed: int,
    indices: Sequence[int],
    prompts: Prompts | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[torch.Tensor]:
    """Yields the images ``indices`` of the set that ``seed`` names, batch by batch.

    Args:
        denoiser: what predicts.
        adapter: all else about the model.
        sampling: sampler and its settings.
        seed: names the set of images.
        indices: which images of the set.
        prompts: for a model that takes text.
        device: where the denoiser is.

    Yields:
        uint8 (B, C, H, W), on the CPU, quantised as diffusers' pipelines do.

    Raises:
        InputError: the sampler does not fit the model, or it needs prompts.
        NonFiniteImagesError: an image is NaN or infinite.
    """
    for start in range(0, len(indices), sampling.batch_size):
        batch = indices[start : start + sampling.batch_size]
        scheduler = sampling.build_scheduler(adapter)  # Anew: some count their steps.
        with sampling.exact_convolutions():
            guidance = image_guidance(adapter, batch, prompts=prompts, scale=sampling.guidance_scale)
            adapter.rest()
            latents, generators = initial_noise(seed, batch, adapter.latent_shape)
            latents = latents.to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
            finite = latents.new_ones(len(latents), dtype=torch.bool)
            for timestep in scheduler.timesteps.tolist():
                model = denoiser.model_at(adapter.noise_process.training_timestep(timestep))
                timesteps = torch.full((len(latents),), timestep, device=device)
                with sampling.autocast(device):
                    prediction = guidance.predict(adapter, model, latents, timesteps)
                finite &= _are_finite(prediction)  # A scheduler that clips would hide it.
                step = scheduler.step(prediction, timestep, latents, **sampling.step_settings(generators))
                latents = step.prev_sample
            images = adapter.decode_latents(latents)
            adapter.rest()
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
