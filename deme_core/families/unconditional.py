"""Unconditional diffusion on pixels: DDPM and its kin (`UNet2DModel`)."""

from collections.abc import Mapping
from typing import Any

from deme_core.families.adapter import Adapter


class Unconditional(Adapter):
    """A UNet2DModel and a scheduler; nothing is frozen, nothing conditions."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    denoiser_classes = ("UNet2DModel",)
    denoiser_part = "unet"

    @classmethod
    def unsupported(cls, denoiser_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> str | None:
        """Returns what a model has that DeMe cannot train or sample; None if it can."""
        for name in ("class_embed_type", "num_class_embeds"):
            if denoiser_config.get(name):
                return f"{name}: it is told classes, which DeMe knows of a DiTPipeline alone"
        num_in, num_out = (denoiser_config.get(f"{which}_channels", 3) for which in ("in", "out"))
        if not isinstance(num_in, int) or num_out not in (num_in, 2 * num_in):
            return f"{num_out} out_channels for {num_in} in_channels, which are neither images nor images and variances"
        return super().unsupported(denoiser_config, scheduler_config)
