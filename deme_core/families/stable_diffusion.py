"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a UNet on latents that attends to CLIP's states of the caption."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from deme_core.families.adapter import ConditioningTensors
from deme_core.families.latent_adapter import DiffusionOnLatents


class StableDiffusion(DiffusionOnLatents):
    """UNet2DConditionModel, AutoencoderKL, CLIPTextModel."""

    pipelines = ("StableDiffusionPipeline",)
    denoiser_classes = ("UNet2DConditionModel",)
    denoiser_part = "unet"
    frozen_parts = ("vae", "text_encoder", "tokenizer")
    conditioned_on = "captions"
    # As the stock pipeline corrects configs that are older than the setting.
    scheduler_overrides: ClassVar[Mapping[str, Any]] = {"clip_sample": False, "steps_offset": 1}
    parts_left_out = ("vae", "safety_checker", "feature_extractor", "image_encoder")

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> ConditioningTensors:
        """Returns CLIP's last hidden states, float32 (B, tokens, width)."""
        states, _ = self.encode_by_pipeline(list(texts), num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states}
