"""Encoded batches: what a training step takes, with no image, text or frozen part in it any more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deme_core.errors import InputError
from deme_core.families.adapter import Adapter, ConditioningTensors
from deme_core.images.training_batch import CropSizes


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """B examples as the denoiser knows them.

    Attributes:
        latents: x_0, float32 (B, C, H, W); the images themselves for a model on pixels.
        conditioning: tensors by name, each (B, ...), as the family's ``encode_`` methods return them.
    """

    latents: torch.Tensor
    conditioning: ConditioningTensors

    def to(self, device: torch.device | str) -> "EncodedBatch":
        """Returns the batch on ``device``."""
        return EncodedBatch(
            self.latents.to(device), {name: tensor.to(device) for name, tensor in self.conditioning.items()}
        )

    def __len__(self) -> int:
        """B."""
        return len(self.latents)


def encode_batch(
    adapter: Adapter,
    images: torch.Tensor,
    *,
    captions: Sequence[str] | None = None,
    labels: torch.Tensor | Sequence[int] | None = None,
    sizes: CropSizes | None = None,
) -> EncodedBatch:
    """Encodes B examples.

    Args:
        adapter: the model's.
        images: float32 (B, C, H, W) in [-1, 1].
        captions: a text for each image.
        labels: a class for each image.
        sizes: see `Adapter.encode_sizes`.

    Raises:
        InputError: the model is conditioned on captions or labels, and there are none.
    """
    check_conditioned(adapter, captions=captions, labels=labels)
    conditioning: ConditioningTensors = {}
    if adapter.conditioned_on == "captions" and captions is not None:
        conditioning |= adapter.encode_prompts(captions)
    if adapter.conditioned_on == "labels" and labels is not None:
        conditioning |= adapter.encode_labels([int(label) for label in labels])
    conditioning |= adapter.encode_sizes(len(images), sizes)
    return EncodedBatch(adapter.encode_images(images), conditioning)


def check_conditioned(adapter: Adapter, *, captions: Any, labels: Any) -> None:
    """Raises an InputError if the model is conditioned on captions or labels, and they are None."""
    if adapter.conditioned_on == "captions" and captions is None:
        raise InputError(
            f"A {adapter.pipeline} is finetuned on images with captions; set dataset.caption_column to the column "
            "that holds them, or make them by dataset.caption_template."
        )
    if adapter.conditioned_on == "labels" and labels is None:
        raise InputError(
            f"A {adapter.pipeline} is finetuned on images with class labels; set dataset.label_column to the "
            "column that holds them."
        )
