"""Stable Diffusion 3 (arXiv 2403.03206): a flow-matching transformer over latents and text together."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch

from deme_core.families.adapter import ConditioningTensors
from deme_core.families.latent_adapter import LatentAdapter
from deme_core.noise_process import FlowMatching, NoiseProcess


class StableDiffusion3(LatentAdapter):
    """SD3Transformer2DModel, AutoencoderKL, two CLIPTextModelWithProjection, and a T5EncoderModel if it is there."""

    pipelines = ("StableDiffusion3Pipeline",)
    denoiser_classes = ("SD3Transformer2DModel",)
    denoiser_part = "transformer"
    frozen_parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    conditioned_on = "captions"
    # Its noise would depend on the batch.
    scheduler_overrides: ClassVar[Mapping[str, Any]] = {"stochastic_sampling": False}
    parts_left_out = ("feature_extractor", "image_encoder")

    @cached_property
    def noise_process(self) -> NoiseProcess:
        """Flow matching."""
        return FlowMatching(int(self.scheduler_config.get("num_train_timesteps", 1000)))

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> ConditioningTensors:
        """Returns the states of all text encoders as one sequence (B, tokens, width), and CLIP's pooled embeddings."""
        prompts = list(texts)
        states, _, pooled, _ = self.text_pipeline.encode_prompt(
            prompts, prompts, prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def denoiser_of_text_pipeline(self) -> Any:
        """Returns the denoiser without weights: its config says how wide the zeros are that stand for an absent T5."""
        from accelerate import init_empty_weights
        from diffusers import SD3Transformer2DModel

        with init_empty_weights():
            return SD3Transformer2DModel.from_config(dict(self.denoiser_config))

    def timestep_settings(self) -> dict[str, Any]:
        """Returns the shift of the timesteps where the scheduler makes it depend on the resolution."""
        if not self.scheduler_config.get("use_dynamic_shifting"):
            return {}
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        _, height, width = self.latent_shape
        patch = self.denoiser_config["patch_size"]
        config = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler_config).config
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return {"mu": calculate_shift((height // patch) * (width // patch), *(config[name] for name in names))}
