"""Unconditional diffusion on pixels: DDPM and its kin (`UNet2DModel`)."""

from functools import cached_property

import torch
from torch import nn

from deme_core.families.adapter import Adapter, ConditioningTensors
from deme_core.noise_process import Diffusion, NoiseProcess


class Unconditional(Adapter):
    """A UNet2DModel and a scheduler; nothing is frozen, nothing conditions."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    denoiser_classes = ("UNet2DModel",)
    denoiser_part = "unet"
    predicts_variance = True

    @cached_property
    def noise_process(self) -> NoiseProcess:
        """Diffusion, by the model's own scheduler config."""
        return Diffusion.from_config(self.scheduler_config)

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: ConditioningTensors
    ) -> torch.Tensor:
        """Returns the denoiser's prediction for noisy images."""
        return denoiser(noisy, timesteps).sample
