"""The size of a denoiser: parameters and floating-point operations, counted without its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deme_core.errors import InputError
from deme_core.families import Adapter, ConditioningTensors
from deme_core.lora import attach_lora
from deme_core.model_folder import build_denoiser
from deme_core.projection import attach_projections
from deme_core.recipe import LoraSpec

# Lengths of captions: of CLIP, and T5's in DeepFloyd IF; of T5 in Stable Diffusion 3, and in Flux.
_CLIP_TOKENS, _SD3_T5_TOKENS, _FLUX_TOKENS = 77, 256, 512
_NUM_SIZES = 6  # That Stable Diffusion XL is told.


@dataclass(frozen=True)
class DenoiserSize:
    """What one denoiser holds, and what one image costs it.

    Attributes:
        num_parameters: without projections.
        forward_flops: operations of one forward pass of one image, an addition and a multiplication each counted.
        num_trained: parameters that are trained: all, projections too; or an adapter's.
        trained_forward_flops: operations of a forward pass with projections or adapter.
        latent_size: numbers in the latents of an image; 0 for a model on pixels.
        caption_size: numbers that a caption becomes; 0 for a model that takes none.
    """

    num_parameters: int
    forward_flops: int
    num_trained: int
    trained_forward_flops: int
    latent_size: int = 0
    caption_size: int = 0


def measure_denoiser(adapter: Adapter, *, channel_projection: bool, lora: LoraSpec | None = None) -> DenoiserSize:
    """Counts what the denoiser of ``adapter`` takes, on torch's meta device: no memory and no time to speak of.

    Args:
        adapter: of any model but PixArt.
        channel_projection: whether copies are trained with projections.
        lora: the adapter that is trained in their place.

    Raises:
        InputError: the model is of another family, or lacks the layers of the adapter.
    """
    conditioning = _conditioning(adapter)
    model = build_denoiser(dict(adapter.denoiser_config), materialize=False).to("meta").eval()
    stock = _count_parameters(model), _count_flops(model, adapter, conditioning)
    if channel_projection:
        attach_projections(model)
    if lora is not None:
        attach_lora(model, lora, seed=0)
    caption = conditioning.get("encoder_hidden_states")
    return DenoiserSize(
        *stock,
        num_trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        trained_forward_flops=_count_flops(model, adapter, conditioning),
        latent_size=prod(adapter.latent_shape) if "vae" in adapter.frozen_parts else 0,
        caption_size=0 if caption is None else caption.numel(),
    )


def _conditioning(adapter: Adapter) -> ConditioningTensors:
    """Returns tensors in the shapes of those that one image is conditioned on."""
    if adapter.conditioned_on == "labels":
        return {name: tensor.to("meta") for name, tensor in adapter.encode_labels([0]).items()}
    if adapter.conditioned_on == "nothing":
        return {}
    shapes = _caption_shapes(adapter.pipelines[0], adapter.denoiser_config)
    return {name: torch.zeros(1, *shape, device="meta") for name, shape in shapes.items()}


def _caption_shapes(pipeline: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what a caption becomes, in the stock pipelines' own lengths.

    Raises:
        InputError: the pipeline is of another family.
    """
    match pipeline:
        case "StableDiffusionPipeline" | "IFPipeline":
            width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
            return {"encoder_hidden_states": (_CLIP_TOKENS, width)}
        case "StableDiffusionXLPipeline":
            pooled = config["projection_class_embeddings_input_dim"] - _NUM_SIZES * config["addition_time_embed_dim"]
            states = (_CLIP_TOKENS, config["cross_attention_dim"])
            return {"encoder_hidden_states": states, "text_embeds": (pooled,), "time_ids": (_NUM_SIZES,)}
        case "StableDiffusion3Pipeline" | "FluxPipeline":
            tokens = _FLUX_TOKENS if pipeline == "FluxPipeline" else _CLIP_TOKENS + _SD3_T5_TOKENS
            states = (tokens, config["joint_attention_dim"])
            return {"encoder_hidden_states": states, "pooled_projections": (config["pooled_projection_dim"],)}
    raise InputError(f"The cost of a {pipeline} is not estimated yet.")


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _count_flops(model: nn.Module, adapter: Adapter, conditioning: ConditioningTensors) -> int:
    noisy = torch.zeros(1, *adapter.latent_shape, device="meta")
    timesteps = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        adapter.predict(model, noisy, timesteps, conditioning)
    return counter.get_total_flops()
