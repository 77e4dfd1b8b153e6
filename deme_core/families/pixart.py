"""PixArt-alpha (arXiv 2310.00426) and -sigma (arXiv 2403.04692): transformers on latents that attend to T5's states."""

from collections.abc import Sequence

import torch
from torch import nn

from deme_core.families.adapter import ConditioningTensors
from deme_core.families.latent_adapter import DiffusionOnLatents
from deme_core.images.training_batch import CropSizes

# The latents' side of the models that are told resolution and aspect ratio, as the stock pipeline has it.
_SIDE_OF_1024 = 128


class PixArt(DiffusionOnLatents):
    """PixArtTransformer2DModel, AutoencoderKL, T5EncoderModel."""

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    # The published ones are older than the class of their own.
    denoiser_classes = ("PixArtTransformer2DModel", "Transformer2DModel")
    denoiser_part = "transformer"
    frozen_parts = ("vae", "text_encoder", "tokenizer")
    conditioned_on = "captions"

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> ConditioningTensors:
        """Returns T5's hidden states (B, tokens, width), and which tokens are text, (B, tokens)."""
        states, mask, _, _ = self.encode_by_pipeline(list(texts), do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def encode_sizes(self, batch_size: int, sizes: CropSizes | None = None) -> ConditioningTensors:
        """Returns ``resolution`` (B, 2) and ``aspect_ratio`` (B, 1), float32, for the models that are told them."""
        if self.denoiser_config.get("sample_size") != _SIDE_OF_1024:
            return {}
        targets = sizes.target_sizes if sizes else torch.tensor(self.image_shape[1:]).expand(batch_size, 2)
        resolution = targets.to(self.device, torch.float32)
        return {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: ConditioningTensors
    ) -> torch.Tensor:
        """Returns the predicted noise; the variance that the model predicts beside it is not used."""
        prediction = denoiser(
            noisy,
            timestep=timesteps,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            encoder_attention_mask=conditioning["encoder_attention_mask"],
            added_cond_kwargs={name: conditioning.get(name) for name in ("resolution", "aspect_ratio")},
        )
        return prediction.sample[:, : noisy.shape[1]]
