"""DeepFloyd IF, first stage (github.com/deep-floyd/IF): a UNet on pixels that attends to T5's states of the caption."""

from collections.abc import Sequence

import torch

from deme_core.families.adapter import ConditioningTensors
from deme_core.families.frozen_parts import FrozenPartsAdapter


class DeepFloydIF(FrozenPartsAdapter):
    """UNet2DConditionModel, T5EncoderModel; what the UNet predicts beside the noise is a variance."""

    pipelines = ("IFPipeline",)
    denoiser_classes = ("UNet2DConditionModel",)
    denoiser_part = "unet"
    frozen_parts = ("text_encoder", "tokenizer")
    conditioned_on = "captions"
    parts_left_out = ("safety_checker", "feature_extractor", "watermarker")

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> ConditioningTensors:
        """Returns T5's hidden states (B, 77, width)."""
        states, _ = self.encode_by_pipeline(list(texts), do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states}
