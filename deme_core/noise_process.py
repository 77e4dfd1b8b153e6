"""How clean images become noisy ones, and what a denoiser should then predict: diffusion, or flow matching.

Training draws integers t in [0, T), in which segments are stated. A process says what t means: how much noise, which
timestep the denoiser is told, and, the other way round, which t a timestep of the sampler belongs to.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deme_core.objectives import NoiseScheduler, training_target

# Classes of diffusers whose config is that of `Diffusion`, a schedule of betas: any of them may have come with a model.
BETA_SCHEDULERS = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
# More than float32 loses of a timestep below 10,000.
_TIMESTEP_ERROR = 1e-2
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)


class NoiseProcess(Protocol):
    """What training, held-out losses and sampling need to know of the noise."""

    @property
    def num_train_timesteps(self) -> int:
        """T."""

    @property
    def samplers(self) -> tuple[str, ...]:
        """Values of ``evaluate.sampler`` that reverse this process, the usual one first."""

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns x_t, (B, ...), for x_0 and epsilon of the same shape and t, int64 (B,)."""

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns what the denoiser should predict at x_t, (B, ...)."""

    def model_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns what the denoiser is told for t, int64 (B,)."""

    def training_timestep(self, model_timestep: float) -> int:
        """Returns the t in [0, T) whose segment a timestep of the sampler belongs to."""


@dataclass(frozen=True)
class Diffusion:
    """x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) epsilon, by a scheduler of diffusers; DDPM and all its kin."""

    scheduler: NoiseScheduler
    samplers: tuple[str, ...] = ("ddim", "ddpm")

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any]) -> "Diffusion":
        """Reads beta schedule and prediction type from the config of whatever scheduler the model came with."""
        from diffusers import DDPMScheduler

        return cls(DDPMScheduler.from_config(dict(scheduler_config)))

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return int(self.scheduler.config.num_train_timesteps)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns x_t; see `NoiseProcess`."""
        return self.scheduler.add_noise(clean, noise, timesteps)

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the target of the scheduler's ``prediction_type``."""
        return training_target(self.scheduler, clean, noise, timesteps)

    def model_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns t: the denoiser is told what was drawn."""
        return timesteps

    def training_timestep(self, model_timestep: float) -> int:
        """Returns t itself."""
        return int(model_timestep)


@dataclass(frozen=True)
class FlowMatching:
    """x_t = (1 - sigma) x_0 + sigma epsilon; the target is the velocity epsilon - x_0 (arXiv 2403.03206, section 2).

    The scheduler's own timesteps are sigma T, in (0, T]. The integer t of training stands for the timestep t + 1, so
    that a segment [low, high) is sigma in (low / T, high / T], and pure noise, sigma = 1, belongs to the last one.
    """

    num_train_timesteps: int
    samplers: tuple[str, ...] = ("flow_match_euler",)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns (1 - sigma) x_0 + sigma epsilon."""
        sigmas = self._sigmas(timesteps, clean)
        return (1 - sigmas) * clean + sigmas * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns epsilon - x_0."""
        return noise - clean

    def model_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns sigma T, float32 (B,)."""
        return (timesteps + 1).to(torch.float32)

    def training_timestep(self, model_timestep: float) -> int:
        """Returns the t whose interval (t, t + 1] holds sigma T, which samplers compute in float32."""
        return min(max(math.ceil(model_timestep - _TIMESTEP_ERROR) - 1, 0), self.num_train_timesteps - 1)

    def _sigmas(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        sigmas = self.model_timesteps(timesteps).to(like.device) / self.num_train_timesteps
        return sigmas.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)
