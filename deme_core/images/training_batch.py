"""What a training step is given: images, and whatever a model may be conditioned on."""

from dataclasses import dataclass

import torch

# The label that stands for none, as the empty text does among captions.
NO_LABEL = -1


@dataclass(frozen=True, eq=False)
class CropSizes:
    """How B images were cut out, as SDXL is told: in pixels, (height, width) or (top, left), int64 (B, 2).

    Attributes:
        original_sizes: of each image as it was stored, upright.
        crop_top_lefts: corner of what was cut out of the resized image, in that image as it is mirrored or not.
        target_sizes: of what was cut out.
    """

    original_sizes: torch.Tensor
    crop_top_lefts: torch.Tensor
    target_sizes: torch.Tensor


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """A batch of B images with their conditioning; all tensors are on the CPU.

    Attributes:
        clean_images: float32 (B, C, H, W), in [-1, 1].
        captions: B texts, empty where dropout took one; None where the data set has no captions.
        labels: class of each image, int64 (B,), -1 where dropout took it; None where the data set has no labels.
        sizes: how the images were cut out; None where nobody knows.
    """

    clean_images: torch.Tensor
    captions: tuple[str, ...] | None = None
    labels: torch.Tensor | None = None
    sizes: CropSizes | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.clean_images)
