"""Stable Diffusion 3 (arXiv 2403.03206): a flow-matching transformer over latents and text together."""

from collections.abc import Sequence
from typing import Any

import torch

from deme_core.families.adapter import ConditioningTensors, whole_number
from deme_core.families.latent_adapter import FlowMatchingOnLatents


class StableDiffusion3(FlowMatchingOnLatents):
    """SD3Transformer2DModel, AutoencoderKL, two CLIPTextModelWithProjection, and a T5EncoderModel if it is there."""

    pipelines = ("StableDiffusion3Pipeline",)
    denoiser_classes = ("SD3Transformer2DModel",)
    denoiser_part = "transformer"
    frozen_parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    conditioned_on = "captions"
    parts_left_out = ("vae", "feature_extractor", "image_encoder")

    @property
    def num_tokens(self) -> int:
        """Patches of an image's latents."""
        _, height, width = self.latent_shape
        patch = whole_number(self.denoiser_config, "patch_size")
        return (height // patch) * (width // patch)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> ConditioningTensors:
        """Returns the states of all text encoders as one sequence (B, tokens, width), and CLIP's pooled embeddings."""
        prompts = list(texts)
        states, _, pooled, _ = self.encode_by_pipeline(prompts, prompts, prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def denoiser_of_text_pipeline(self) -> Any:
        """Returns the denoiser without weights: its config says how wide the zeros are that stand for an absent T5."""
        from accelerate import init_empty_weights
        from diffusers import SD3Transformer2DModel

        with init_empty_weights():
            return SD3Transformer2DModel.from_config(dict(self.denoiser_config))
