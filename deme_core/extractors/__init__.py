"""Feature extractors: images in, one feature vector per image out.

Features of two extractors are never comparable; `FeatureExtractor.digest` tells extractors apart, by all that
changes the features: weights, resolution and preprocessing.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from deme_core.extractors.base import FeatureArray, FeatureExtractor, NetworkExtractor
from deme_core.extractors.clip import load_clip
from deme_core.extractors.dinov2 import load_dinov2
from deme_core.extractors.efficientnet_lite0 import load_efficientnet
from deme_core.extractors.inception import load_inception

__all__ = ["EXTRACTORS", "FeatureArray", "FeatureExtractor", "NetworkExtractor", "load_extractor"]

# Each takes the weights, the resolution, the folder for what is fetched, and the device.
EXTRACTORS: dict[str, Callable[[str | None, int | None, Path, torch.device], FeatureExtractor]] = {
    "inception": load_inception,
    "inception_legacy_pytorch": partial(load_inception, mode="legacy_pytorch"),
    "inception_legacy_tensorflow": partial(load_inception, mode="legacy_tensorflow"),
    "efficientnet_lite0": load_efficientnet,
    "dinov2_vitl14": load_dinov2,
    "clip_vit_b_32": load_clip,
}


def load_extractor(
    name: str, *, weights: str | None = None, resolution: int | None = None, cache: Path, device: torch.device | str
) -> FeatureExtractor:
    """Load a feature extractor; weights that cannot be had are an ExtractorUnavailableError.

    Without weights given, 'inception' is downloaded from where clean-fid has it, once per cache, 'dinov2_vitl14' and
    'clip_vit_b_32' by the hub's client into its own cache; 'efficientnet_lite0' reaches nothing outside.

    Args:
        name: one of EXTRACTORS.
        weights: path or object-store URI of the weights; default the library's own. What a URI names is
            fetched once per cache. A folder for clip_vit_b_32, one file for the others.
        resolution: side images are resized to, for efficientnet_lite0; default 224.
        cache: folder for weights that have to be fetched; may be deleted at any time.
        device: where the network runs.

    Returns:
        The extractor, its weights loaded.

    Raises:
        ValueError: for an unknown name, or a resolution that the extractor does not have.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"There is no extractor {name!r}; choose one of {', '.join(EXTRACTORS)}.")
    return EXTRACTORS[name](weights, resolution, cache / "extractors", torch.device(device))
