"""Real diffusers models, small enough to train within a test."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn

from deme_core.families import Adapter, Unconditional
from deme_core.model_folder_writer import write_model_folder
from deme_core.projection import is_projection

UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
SCHEDULER_CONFIG: dict[str, Any] = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}

# Every kind of block that UNet2DModel can be built of, by what is special about it.
UNET_VARIANTS: dict[str, dict[str, Any]] = {
    "conv": {},
    "attention, resnet resampling": {
        "down_block_types": ["AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "resnet resampling, scale_shift": {
        "down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "ResnetUpsampleBlock2D"],
        "resnet_time_scale_shift": "scale_shift",
        "mid_block_scale_factor": 2.0,
    },
    "FIR skip": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [32, 32],
        "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
        "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
        "time_embedding_type": "fourier",
    },
    "K": {
        "block_out_channels": [32, 32],
        "down_block_types": ["KDownBlock2D", "KDownBlock2D"],
        "up_block_types": ["KUpBlock2D", "KUpBlock2D"],
    },
    "4x4": {"sample_size": 4, "dropout": 0.5},
}


def tiny_unet(seed: int = 0, **overrides: Any) -> nn.Module:
    """Returns a UNet2DModel with random weights, in eval mode."""
    torch.manual_seed(seed)
    return UNet2DModel.from_config({**UNET_CONFIG, **overrides}).eval()


def one_level_unet(seed: int = 0, **overrides: Any) -> nn.Module:
    """Returns a UNet2DModel of one resolution, twice as fast, for tests that do not care."""
    blocks = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    return tiny_unet(seed, **{**blocks, **overrides})


def tiny_conditional_unet(seed: int = 0, **overrides: Any) -> nn.Module:
    """Returns a UNet2DConditionModel, as Stable Diffusion's but small, in eval mode."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**config, **overrides}).eval()


def tiny_images(num_images: int, *, seed: int = 0, size: int = 8, channels: int = 1) -> torch.Tensor:
    """Returns random images in [-1, 1], float32 (B, C, H, W)."""
    shape = (num_images, channels, size, size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def predict(model: nn.Module, timesteps: tuple[int, ...] = (3, 700), seed: int = 0) -> torch.Tensor:
    """Returns what ``model`` predicts for fixed noisy images at ``timesteps``."""
    size, channels = model.config["sample_size"], model.config["in_channels"]
    noisy_images = tiny_images(len(timesteps), seed=seed, size=size, channels=channels)
    with torch.no_grad():
        return model(noisy_images, torch.tensor(timesteps)).sample


def randomize(model: nn.Module, *, seed: int, scale: float = 0.1) -> nn.Module:
    """Adds noise to every parameter of ``model``, projections included."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * scale)
    return model


def randomize_projections(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Replaces every channel projection of ``model`` by a random matrix."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_projection(name):
                parameter.copy_(torch.randn(parameter.shape, generator=rng) / len(parameter) ** 0.5)
    return model


def tiny_scheduler(**overrides: Any) -> DDPMScheduler:
    """Returns a DDPMScheduler."""
    return DDPMScheduler.from_config({**SCHEDULER_CONFIG, **overrides})


def tiny_adapter(model: nn.Module | None = None, **scheduler_config: Any) -> Adapter:
    """Returns the adapter of a UNet2DModel."""
    config = UNET_CONFIG if model is None else dict(model.config)
    return Unconditional(denoiser_config=config, scheduler_config={**SCHEDULER_CONFIG, **scheduler_config})


def write_tiny_folder(path: Path, model: nn.Module, **denoiser_config: Any) -> Path:
    """Writes ``model``, projections included, as a model folder."""
    write_model_folder(
        path,
        denoiser_config={**UNET_CONFIG, **denoiser_config},
        scheduler_config=SCHEDULER_CONFIG,
        tensors=model.state_dict(),
    )
    return path


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit, the sign of zero and NaN included."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8))
