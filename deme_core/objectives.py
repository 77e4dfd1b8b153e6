"""What a finetuned copy minimises (METHOD section 1)."""

from typing import Protocol

import torch
import torch.nn.functional as F

from deme_core.errors import InputError

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class NoiseScheduler(Protocol):
    """The part of a diffusers scheduler that training uses."""

    @property
    def config(self) -> "NoiseSchedulerConfig":
        """The scheduler's settings."""

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """The products of 1 - beta up to each timestep, float32 (T,)."""

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the noisy images x_t."""

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the v-prediction target."""


class NoiseSchedulerConfig(Protocol):
    """The part of a diffusers scheduler config that training uses."""

    prediction_type: str
    num_train_timesteps: int


def training_target(
    noise_scheduler: NoiseScheduler, clean_images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Returns what the model should predict, by the scheduler's ``prediction_type``.

    Args:
        noise_scheduler: a diffusers scheduler.
        clean_images: x_0, (B, C, H, W), in [-1, 1].
        noise: epsilon, (B, C, H, W), standard normal.
        timesteps: t, int64 (B,).

    Raises:
        InputError: the prediction type is none of epsilon, sample and v_prediction.
    """
    match noise_scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return clean_images
        case "v_prediction":
            return noise_scheduler.get_velocity(clean_images, noise, timesteps)
        case other:
            raise InputError(f"prediction_type '{other}' is not one of {', '.join(PREDICTION_TYPES)}.")


def min_snr_weights(noise_scheduler: NoiseScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Returns Min-SNR's weight of each sample's loss (Hang et al. 2023, arXiv 2303.09556).

    It is min(SNR, gamma) for an error of x_0, where SNR = alpha_t / (1 - alpha_t); an error of epsilon counts SNR times
    as much, and one of v SNR + 1 times.

    Args:
        noise_scheduler: a diffusers scheduler.
        timesteps: t, int64 (B,).
        gamma: largest weight; 5 in the paper.

    Returns:
        float32 (B,), on the device of ``timesteps``; of a noise without any signal 1 for epsilon, 0 for the others.

    Raises:
        InputError: as for `training_target`.
    """
    alphas = noise_scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    snr = alphas / (1 - alphas)
    match noise_scheduler.config.prediction_type:
        case "epsilon":
            return (gamma / snr).clamp(max=1)
        case "sample":
            return snr.clamp(max=gamma)
        case "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        case other:
            raise InputError(f"prediction_type '{other}' is not one of {', '.join(PREDICTION_TYPES)}.")


def diffusion_loss(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the mean of (f_theta(x_t, t) - target)^2 over all elements, in float32.

    Args:
        prediction: (B, ...).
        target: of the same shape.
        weights: of each sample, (B,); None for 1 each.
    """
    if weights is None:
        return F.mse_loss(prediction.float(), target.float())
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
    return (weights * errors).mean()


def consistency_loss(prediction: torch.Tensor, pretrained_prediction: torch.Tensor) -> torch.Tensor:
    """Returns the mean of (f_theta(x_t, t) - f_theta0(x_t, t))^2 over all elements, in float32."""
    return F.mse_loss(prediction.float(), pretrained_prediction.detach().float())
