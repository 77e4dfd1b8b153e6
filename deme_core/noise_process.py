"""How clean images become noisy ones, and what a denoiser should then predict: diffusion, or flow matching.

Training draws integers t in [0, T), in which segments are stated. A process says what t means: how much noise, which
timestep the denoiser is told, and, the other way round, which t a timestep of the sampler belongs to.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deme_core.errors import InputError, ModelFolderError, first_line
from deme_core.objectives import PREDICTION_TYPES, NoiseScheduler, min_snr_weights, training_target

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
_CONFIG = "The model's scheduler_config.json"
# Of a scheduler's config, what adding noise does not take, but sampling does.
_SAMPLING_NUMBERS = ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "steps_offset")
# The schedules that go from beta_start to beta_end; others take neither.
_BETWEEN_BETAS = ("linear", "scaled_linear", "sigmoid")
_SPACINGS = ("leading", "trailing", "linspace")
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

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Returns Min-SNR's weight of the loss of each sample, float32 (B,), for t, int64 (B,).

        Raises:
            InputError: there is none for such a process.
        """

    def training_timestep(self, model_timestep: float) -> int:
        """Returns the t in [0, T) whose segment a timestep of the sampler belongs to."""


@dataclass(frozen=True)
class Diffusion:
    """x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) epsilon, by a scheduler of diffusers; DDPM and all its kin."""

    scheduler: NoiseScheduler
    samplers: tuple[str, ...] = ("ddim", "ddpm")

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any]) -> "Diffusion":
        """Reads beta schedule and prediction type from the config of whatever scheduler the model came with.

        Raises:
            ModelFolderError: the config describes no noise.
        """
        from diffusers import DDPMScheduler

        _check_betas(scheduler_config)
        try:
            scheduler = DDPMScheduler.from_config(dict(scheduler_config))
        except Exception as error:  # diffusers raises many kinds for what it cannot build.
            raise ModelFolderError(f"{_CONFIG} describes no noise schedule ({first_line(error)}).") from error
        _check_diffusion(scheduler)
        return cls(scheduler)

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

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Returns those of the scheduler's ``prediction_type``."""
        return min_snr_weights(self.scheduler, timesteps, gamma)

    def training_timestep(self, model_timestep: float) -> int:
        """Returns t itself."""
        return int(model_timestep)


def _check_betas(config: Mapping[str, Any]) -> None:
    """Raises a ModelFolderError if the config leaves to its class what DDPMScheduler has another default for."""
    import diffusers

    known = inspect.signature(diffusers.DDPMScheduler).parameters
    own = inspect.signature(getattr(diffusers, config.get("_class_name", "DDPMScheduler"))).parameters
    for name in ("beta_start", "beta_end", "beta_schedule"):
        if name not in config and name in own and own[name].default != known[name].default:
            raise ModelFolderError(
                f"{_CONFIG} gives no {name}, and {config['_class_name']} has its own, {own[name].default!r}; write it "
                "there."
            )
    for name, value in _given_betas(config):
        if isinstance(value, int | float) and not 0 <= value < 1:
            raise ModelFolderError(f"{_CONFIG} gives {name} as {value!r}; a beta is at least 0 and less than 1.")


def _given_betas(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields, with their names, the settings between which all betas lie, if the schedule takes any."""
    trained = config.get("trained_betas")
    if isinstance(trained, list | tuple):
        yield from ((f"trained_betas[{index}]", value) for index, value in enumerate(trained))
    elif trained is None and config.get("beta_schedule", "linear") in _BETWEEN_BETAS:
        yield from ((name, config[name]) for name in ("beta_start", "beta_end") if name in config)


def _check_diffusion(scheduler: Any) -> None:
    """Raises a ModelFolderError if a DDPMScheduler that could be built cannot add noise, or could not be sampled."""
    config, betas = scheduler.config, scheduler.betas
    if config.rescale_betas_zero_snr:
        betas = betas[:-1]  # The last one is 1: nothing of the image is left.
    if len(scheduler.betas) != config.num_train_timesteps or not bool(((betas >= 0) & (betas < 1)).all()):
        raise ModelFolderError(
            f"{_CONFIG} gives no beta between 0 and 1 for each of {config.num_train_timesteps} timesteps."
        )
    for name, known in {"prediction_type": PREDICTION_TYPES, "timestep_spacing": _SPACINGS}.items():
        if config[name] not in known:
            raise ModelFolderError(f"{_CONFIG} gives {name} as {config[name]!r}, not as one of {', '.join(known)}.")
    for name in _SAMPLING_NUMBERS:
        if not isinstance(config[name], int | float):
            raise ModelFolderError(f"{_CONFIG} gives {name} as {config[name]!r}, not as a number.")
    if type(config.steps_offset) is not int or not 0 <= config.steps_offset < config.num_train_timesteps:
        raise ModelFolderError(f"{_CONFIG} gives steps_offset as {config.steps_offset!r}, which is no timestep.")


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

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Raises an InputError: Min-SNR is stated for diffusion."""
        raise InputError("Min-SNR weighs the loss of diffusion models, not of flow matching; leave min_snr_gamma out.")

    def training_timestep(self, model_timestep: float) -> int:
        """Returns the t whose interval (t, t + 1] holds sigma T, which samplers compute in float32."""
        return min(max(math.ceil(model_timestep - _TIMESTEP_ERROR) - 1, 0), self.num_train_timesteps - 1)

    def _sigmas(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        sigmas = self.model_timesteps(timesteps).to(like.device) / self.num_train_timesteps
        return sigmas.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)
