"""DiT (arXiv 2212.09748): a class-conditional transformer on latents."""

from collections.abc import Sequence

import torch
from torch import nn

from deme_core.families.adapter import NO_LABEL, ConditioningTensors, whole_number
from deme_core.families.latent_adapter import DiffusionOnLatents


class DiT(DiffusionOnLatents):
    """DiTTransformer2DModel, AutoencoderKL."""

    pipelines = ("DiTPipeline",)
    # The published ones are older than the class of their own.
    denoiser_classes = ("DiTTransformer2DModel", "Transformer2DModel")
    denoiser_part = "transformer"
    frozen_parts = ("vae",)
    conditioned_on = "labels"

    @property
    def num_classes(self) -> int:
        """Number of class labels; the one after the last stands for no class."""
        return whole_number(self.denoiser_config, "num_embeds_ada_norm")

    def encode_labels(self, labels: Sequence[int]) -> ConditioningTensors:
        """Returns ``class_labels``, int64 (B,).

        Raises:
            InputError: the model does not know a class.
        """
        self.check_labels(labels)
        known = [self.num_classes if label == NO_LABEL else label for label in labels]
        return {"class_labels": torch.tensor(known, device=self.device)}

    def prepare_training(self, denoiser: nn.Module) -> None:
        """Switches the model's own label dropout off.

        In diffusers each block drops labels by itself, and the frozen model of the consistency loss drops none.
        """
        for module in denoiser.modules():
            if type(module).__name__ == "LabelEmbedding":
                setattr(module, "dropout_prob", 0.0)  # noqa: B010 (no attribute that a Module declares)
