"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, and the image's sizes as a condition of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deme_core.families.adapter import ConditioningTensors
from deme_core.families.latent_adapter import DiffusionOnLatents
from deme_core.images.training_batch import CropSizes
from deme_core.model_json import INDEX_NAME, read_json


class StableDiffusionXL(DiffusionOnLatents):
    """UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection."""

    pipelines = ("StableDiffusionXLPipeline",)
    denoiser_classes = ("UNet2DConditionModel",)
    denoiser_part = "unet"
    frozen_parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    conditioned_on = "captions"
    parts_left_out = ("vae", "feature_extractor", "image_encoder")

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """Says so where the empty text is encoded like any other, and does not become zeros."""
        is_zeros = read_json(self.frozen / INDEX_NAME).get("force_zeros_for_empty_prompt", True)
        return {} if is_zeros else {"force_zeros_for_empty_prompt": False}

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> ConditioningTensors:
        """Returns both encoders' hidden states (B, tokens, width), and the second's pooled embedding (B, width).

        The empty text is all zeros where the pipeline says so: what its own sampler guides away from.
        """
        states, _, pooled, _ = self.encode_by_pipeline(list(texts), do_classifier_free_guidance=False)
        if not self.prompt_settings:
            given = torch.tensor([float(bool(text)) for text in texts], device=self.device)
            states, pooled = states * given[:, None, None], pooled * given[:, None]
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    def encode_sizes(self, batch_size: int, sizes: CropSizes | None = None) -> ConditioningTensors:
        """Returns ``time_ids``, float32 (B, 6): original size, top left of the crop, size of the crop."""
        own = torch.tensor(self.image_shape[1:]).expand(batch_size, 2)
        told = sizes or CropSizes(own, torch.zeros_like(own), own)
        time_ids = torch.cat((told.original_sizes, told.crop_top_lefts, told.target_sizes), dim=1)
        return {"time_ids": time_ids.to(self.device, torch.float32)}

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: ConditioningTensors
    ) -> torch.Tensor:
        """Returns the denoiser's prediction for noisy latents."""
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        states = conditioning["encoder_hidden_states"]
        return denoiser(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=added).sample
