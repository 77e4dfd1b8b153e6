"""How images are sampled: the diffusers scheduler and its settings, and what cannot be sampled so."""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch

from deme_core.errors import InputError, ModelFolderError, first_line
from deme_core.families import Adapter
from deme_core.precision import DTYPES
from deme_core.recipe import EvaluateSpec, Precision, Sampler
from deme_core.tf32 import without_tf32

# Leading steps are T // n long, and may leave timesteps out at the noisy end: at most a quarter of them.
_LEAST_START = 0.75
_SCHEDULERS: dict[Sampler, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "flow_match_euler": "FlowMatchEulerDiscreteScheduler",
}


@dataclass(frozen=True)
class Sampling:
    """How images are sampled: the part of the evaluation that every row shares.

    Attributes:
        sampler: ddim or ddpm for diffusion, flow_match_euler for flow matching.
        num_inference_steps: sampling steps.
        eta: noise of DDIM; 0 is deterministic.
        timestep_spacing: None keeps the scheduler config's; but ddim, which has no linspace, takes leading for that.
        guidance_scale: of classifier-free guidance; 1 is none.
        batch_size: images per batch; changes images by rounding alone.
        precision: autocast type of the denoiser; all else, as the scheduler's steps, is float32.
    """

    sampler: Sampler = "ddim"
    num_inference_steps: int = 50
    eta: float = 0.0
    timestep_spacing: str | None = None
    guidance_scale: float = 1.0
    batch_size: int = 64
    precision: Precision = "fp32"

    @classmethod
    def of(cls, evaluate: EvaluateSpec) -> Self:
        """Returns how a recipe's evaluation samples."""
        return cls(
            sampler=evaluate.sampler,
            num_inference_steps=evaluate.num_inference_steps,
            eta=evaluate.eta,
            timestep_spacing=evaluate.timestep_spacing,
            guidance_scale=evaluate.guidance_scale,
            batch_size=evaluate.batch_size,
            precision=evaluate.mixed_precision,
        )

    def build_scheduler(self, adapter: Adapter) -> Any:
        """Returns the diffusers scheduler, its timesteps set.

        Raises:
            InputError: the sampler is not for such models, or takes no timestep spacing or not so many steps of it;
                there are too many steps, or guidance of a model that takes no conditions.
            ModelFolderError: the scheduler config cannot be used.
        """
        if self.sampler not in (known := adapter.noise_process.samplers):
            raise InputError(
                f"The sampler {self.sampler} does not fit a {adapter.pipeline}; set evaluate.sampler, or --sampler on "
                f"the command line, to {' or '.join(known)}."
            )
        if self.guidance_scale != 1.0 and adapter.conditioned_on == "nothing":
            raise InputError(
                f"Nothing can guide a {adapter.pipeline}, which takes no conditions; leave evaluate.guidance_scale, or "
                "--guidance-scale on the command line, at 1."
            )
        if self.num_inference_steps > (num_timesteps := adapter.noise_process.num_train_timesteps):
            raise InputError(
                f"{self.num_inference_steps} sampling steps are more than the model's {num_timesteps} timesteps; lower "
                "evaluate.num_inference_steps, or --num-inference-steps on the command line."
            )
        if self.sampler == "flow_match_euler" and self.timestep_spacing:
            raise InputError("The sampler flow_match_euler has one spacing only; leave evaluate.timestep_spacing out.")
        overrides: dict[str, Any] = {"timestep_spacing": self.timestep_spacing} if self.timestep_spacing else {}
        is_learned = adapter.scheduler_config.get("variance_type") in ("learned", "learned_range")
        if self.sampler == "ddpm" and is_learned:
            # DDPM's posterior variance and diffusers' default; DDIM, which takes no learned one, has it at eta 1.
            overrides["variance_type"] = "fixed_small"
        scheduler = self._scheduler(adapter, overrides)
        if self.sampler == "ddim" and not self.timestep_spacing and scheduler.config.timestep_spacing == "linspace":
            # Models that came with a multistep sampler have it; its steps are longer than the T // n that DDIM goes.
            scheduler = self._scheduler(adapter, {**overrides, "timestep_spacing": "leading"})
        if self.sampler != "flow_match_euler":
            self._check_timesteps(scheduler, num_timesteps)
        if self.sampler == "ddpm":
            self._check_variance(scheduler)
        return scheduler

    def _scheduler(self, adapter: Adapter, overrides: dict[str, Any]) -> Any:
        import diffusers

        scheduler_class = getattr(diffusers, _SCHEDULERS[self.sampler])
        try:
            scheduler = scheduler_class.from_config(dict(adapter.scheduler_config), **overrides)
            scheduler.set_timesteps(self.num_inference_steps, **adapter.timestep_settings(self.num_inference_steps))
        except ModelFolderError:
            raise
        except Exception as error:  # diffusers raises many kinds for what it cannot use.
            problem = f"makes no {_SCHEDULERS[self.sampler]} ({first_line(error)})"
            raise ModelFolderError(f"The scheduler_config.json of this {adapter.pipeline} {problem}.") from error
        return scheduler

    def _check_timesteps(self, scheduler: Any, num_timesteps: int) -> None:
        """Raises an InputError if the sampler would not start at noise, or step over the timesteps that it stops at."""
        num_steps, spacing = self.num_inference_steps, scheduler.config.timestep_spacing
        scheduler = copy.copy(scheduler)

        def fits(num_steps: int) -> bool:
            # DDIM goes T // n timesteps down from wherever it is; DDPM goes to the next one of its list.
            if self.sampler == "ddim" and (
                spacing == "linspace" or (spacing == "trailing" and num_timesteps % num_steps)
            ):
                return False
            scheduler.set_timesteps(num_steps)
            first, last = scheduler.timesteps[0], scheduler.timesteps[-1]
            is_whole = len(scheduler.timesteps) == num_steps and last >= 0
            return is_whole and _LEAST_START * num_timesteps <= first < num_timesteps

        if fits(num_steps):
            return
        steps = f"{num_steps} {spacing} steps of the model's {num_timesteps} timesteps"
        if self.sampler == "ddim" and spacing == "linspace":
            mend = "set evaluate.timestep_spacing to leading, or leave it out"
            raise InputError(f"The sampler ddim does not stop where {steps} do; {mend}.")
        nearest = [
            next(filter(fits, range(num_steps, end, sign)), None) for end, sign in ((0, -1), (num_timesteps + 1, 1))
        ]
        able = " or ".join(str(number) for number in nearest if number is not None)
        mend = (
            "set evaluate.num_inference_steps (of a search merge.search.few_steps, on the command line "
            f"--num-inference-steps) to {able}"
        )
        if self.sampler == "ddim" and spacing == "trailing":
            raise InputError(
                f"The sampler ddim does not stop where {steps} do, since they are not all of one length; {mend}, or "
                "evaluate.timestep_spacing to leading."
            )
        scheduler.set_timesteps(num_steps)
        first, last = int(scheduler.timesteps[0]), int(scheduler.timesteps[-1])
        if last < 0:  # diffusers rounds T - k T / n.
            raise InputError(f"{steps} end at timestep {last}, which there is not, by rounding; {mend}.")
        where = "past the last" if first >= num_timesteps else "far from noise, which they start with"
        raise InputError(f"{steps} begin at timestep {first}, {where}; {mend}.")

    def _check_variance(self, scheduler: Any) -> None:
        """Raises an InputError if DDPM would leave noise on the images, or make none."""
        kind, spacing = scheduler.config.variance_type, scheduler.config.timestep_spacing
        mend = "set evaluate.sampler, or --sampler on the command line,"
        if kind == "fixed_large_log":  # DDPMScheduler.step takes the root of the logarithm.
            raise InputError(
                f"Stock diffusers makes no images with the sampler ddpm and variance_type {kind}, which the model's "
                f"scheduler_config.json gives; {mend} to ddim."
            )
        # It adds noise at every timestep but 0; the posterior's variance vanishes at the last one wherever that is.
        if kind == "fixed_large" and (last := int(scheduler.timesteps[-1])) > 0:
            other = "" if spacing == "leading" else ", or evaluate.timestep_spacing to leading"
            raise InputError(
                f"The sampler ddpm leaves noise on the images of {spacing} steps, which end at timestep {last}, with "
                f"variance_type {kind}, which the model's scheduler_config.json gives; {mend} to ddim{other}."
            )

    def step_settings(self, generators: list[torch.Generator]) -> dict[str, Any]:
        """Returns what the scheduler's ``step`` takes besides prediction, timestep and latents."""
        match self.sampler:
            case "ddim":
                return {"generator": generators, "eta": self.eta}
            case "ddpm":
                return {"generator": generators}
            case "flow_match_euler":
                return {}

    @property
    def dtype(self) -> str:
        """What the denoiser computes in, as the conditions of a score name it."""
        return str(DTYPES[self.precision]).removeprefix("torch.")

    def autocast(self, device: torch.device | str) -> AbstractContextManager[Any]:
        """Returns what the denoiser predicts under."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(torch.device(device).type, dtype=DTYPES[self.precision])

    def exact_convolutions(self) -> AbstractContextManager[Any]:
        """Returns what images are made under: in fp32 without TF32, as features are extracted."""
        # TF32 would let a GPU's images differ from a CPU's, under conditions that call both float32.
        return without_tf32() if self.precision == "fp32" else nullcontext()
