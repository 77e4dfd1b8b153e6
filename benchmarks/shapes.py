"""Shapes of denoisers that benchmarks use, with random weights: the real ones, and tiny ones of the same parts."""

from collections.abc import Callable
from typing import Any

import torch

from deme_core.families import Adapter, ConditioningTensors, StableDiffusion, Unconditional

_NUM_TOKENS = 77


def cifar10(*, tiny: bool = False) -> dict[str, Any]:
    """Returns the config of google/ddpm-cifar10-32: 35.7 million parameters."""
    width = 32 if tiny else 128
    return {
        "_class_name": "UNet2DModel",
        "sample_size": 32,
        "block_out_channels": (width, 2 * width, 2 * width, 2 * width),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }


def lsun(*, tiny: bool = False) -> dict[str, Any]:
    """Returns the config of google/ddpm-ema-church-256: 113.7 million parameters."""
    width = 32 if tiny else 128
    return {
        "_class_name": "UNet2DModel",
        "sample_size": 64 if tiny else 256,
        "block_out_channels": tuple(width * factor for factor in (1, 1, 2, 2, 4, 4)),
        "layers_per_block": 2,
        "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        "attention_head_dim": None,
    }


def sd14(*, tiny: bool = False) -> dict[str, Any]:
    """Returns the config of CompVis/stable-diffusion-v1-4: 859.5 million parameters."""
    width = 32 if tiny else 320
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 16 if tiny else 64,
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "cross_attention_dim": 64 if tiny else 768,
        "attention_head_dim": 8,
    }


def sdxl(*, tiny: bool = False) -> dict[str, Any]:
    """Returns the config of stabilityai/stable-diffusion-xl-base-1.0: 2,567 million parameters."""
    width = 32 if tiny else 320
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 16 if tiny else 128,
        "block_out_channels": (width, 2 * width, 4 * width),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 2 if tiny else 10),
        "attention_head_dim": (5, 10, 20) if not tiny else 8,
        "cross_attention_dim": 64 if tiny else 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 32 if tiny else 256,
        "projection_class_embeddings_input_dim": 32 * 6 + 64 if tiny else 2816,
    }


SHAPES: dict[str, Callable[..., dict[str, Any]]] = {"cifar10": cifar10, "lsun": lsun, "sd14": sd14, "sdxl": sdxl}


def adapter_of(config: dict[str, Any]) -> Adapter:
    """Returns the adapter of a denoiser on pixels, or of Stable Diffusion 1.x."""
    family = Unconditional if config["_class_name"] == "UNet2DModel" else StableDiffusion
    return family(denoiser_config={"in_channels": 3, **config}, scheduler_config={})


def random_batch(config: dict[str, Any], batch_size: int, device: str) -> tuple[torch.Tensor, ConditioningTensors]:
    """Returns what one training step is given: images in [-1, 1], or latents and states of captions."""
    size, rng = config["sample_size"], torch.Generator().manual_seed(0)
    if config["_class_name"] == "UNet2DModel":
        return (torch.rand(batch_size, 3, size, size, generator=rng) * 2 - 1).to(device), {}
    states = torch.randn(batch_size, _NUM_TOKENS, config["cross_attention_dim"], generator=rng)
    latents = torch.randn(batch_size, 4, size, size, generator=rng)
    return latents.to(device), {"encoder_hidden_states": states.to(device)}
