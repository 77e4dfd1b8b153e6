"""Flux.1 (github.com/black-forest-labs/flux): a flow-matching transformer over packed latents and text together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deme_core.families.adapter import ConditioningTensors, check_shape, whole_number
from deme_core.families.latent_adapter import FlowMatchingOnLatents

# Latents' side of the images that the stock pipeline makes; no config says it.
_SIDE = 128
# What a model that was distilled from a guided one is told, in training as in sampling: the stock pipeline's default.
_DISTILLED_GUIDANCE = 3.5


class Flux(FlowMatchingOnLatents):
    """FluxTransformer2DModel, AutoencoderKL, CLIPTextModel, T5EncoderModel.

    Latents are (B, C, H, W) as everywhere; only the denoiser sees them packed, each 2 x 2 patch a token.
    """

    pipelines = ("FluxPipeline",)
    denoiser_classes = ("FluxTransformer2DModel",)
    denoiser_part = "transformer"
    frozen_parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    conditioned_on = "captions"
    parts_left_out = ("vae", "feature_extractor", "image_encoder")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W): of 1024 pixels, or as ``sample_size`` says, which may be added to the denoiser's config."""
        side = whole_number({"sample_size": _SIDE, **self.denoiser_config}, "sample_size")
        return check_shape(whole_number(self.denoiser_config, "in_channels") // 4, side, side)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: 2 x 2 patches."""
        _, height, width = self.latent_shape
        return (height // 2) * (width // 2)

    def timestep_settings(self, num_inference_steps: int) -> dict[str, Any]:
        """Returns evenly spaced sigmas from 1, as the stock pipeline has them, and their shift."""
        sigmas = torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64).tolist()
        return {"sigmas": sigmas} | super().timestep_settings(num_inference_steps)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> ConditioningTensors:
        """Returns T5's hidden states (B, 512, width), and CLIP's pooled embedding (B, width)."""
        states, pooled, _ = self.encode_by_pipeline(list(texts), None)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: ConditioningTensors
    ) -> torch.Tensor:
        """Returns the predicted velocity for noisy latents; see `Adapter.predict`."""
        batch_size, channels, height, width = noisy.shape
        patches = noisy.view(batch_size, channels, height // 2, 2, width // 2, 2)
        states = conditioning["encoder_hidden_states"]
        prediction = denoiser(
            patches.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, -1, channels * 4),
            timestep=timesteps / self.noise_process.num_train_timesteps,
            guidance=self._guidance(batch_size, noisy.device),
            txt_ids=torch.zeros(states.shape[1], 3, device=noisy.device),
            img_ids=_positions(height // 2, width // 2).to(noisy.device),
            **conditioning,
        ).sample
        patches = prediction.view(batch_size, height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)

    def _guidance(self, batch_size: int, device: torch.device) -> torch.Tensor | None:
        if not self.denoiser_config.get("guidance_embeds"):
            return None
        return torch.full((batch_size,), _DISTILLED_GUIDANCE, device=device)


def _positions(height: int, width: int) -> torch.Tensor:
    """Returns 0, row and column of each patch, float32 (height * width, 3)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
