"""Images averaged to a few pixels: colours and their layout, which a network may overlook, and no weights at all."""

from pathlib import Path

import torch

from deme_core.digests import json_digest
from deme_core.extractors.base import FeatureArray

NAME = "pixels_4x4"
_SIDE = 4


class PixelExtractor:
    """Means of a 4 x 4 grid of cells for each of three colours, in 0..1.

    Attributes:
        name: which extractor.
        digest: SHA-256 over its name and version.
        num_features: length D of a feature vector, 48.
    """

    name = NAME
    digest = json_digest({"name": NAME, "version": 1})
    num_features = 3 * _SIDE**2

    def __call__(self, images: torch.Tensor) -> FeatureArray:
        """Features (B, 48) of uint8 images (B, C, H, W), C = 1 or 3; grey ones have three equal colours."""
        cells = torch.nn.functional.adaptive_avg_pool2d(images.cpu().float() / 255, _SIDE)
        return cells.expand(-1, 3, -1, -1).reshape(len(images), -1).numpy()


def load_pixels(weights: str | None, resolution: int | None, folder: Path, device: torch.device) -> PixelExtractor:
    """Returns the extractor, which takes images as they are, and no weights (else ValueError)."""
    if weights is not None:
        raise ValueError(f"{NAME} has no weights; leave evaluate.extractor_weights out.")
    return PixelExtractor()


def pixels_digest(weights: str | None, resolution: int | None, folder: Path) -> str:
    """Returns the digest of the extractor."""
    return PixelExtractor.digest
