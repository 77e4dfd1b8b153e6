"""Feature extractors: images in, one feature vector per image out.

Features of two extractors are never comparable; `FeatureExtractor.digest` tells extractors apart, by all that
changes the features: weights, resolution and preprocessing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from deme_core.extractor_names import EXTRACTOR_NAMES, OF_ANY_RESOLUTION, ExtractorMode, mode_name
from deme_core.extractors.base import FeatureArray, FeatureExtractor, NetworkExtractor
from deme_core.extractors.clip import load_clip
from deme_core.extractors.dinov2 import load_dinov2
from deme_core.extractors.efficientnet_lite import load_efficientnet
from deme_core.extractors.inception import load_inception
from deme_core.extractors.joint import JointExtractor
from deme_core.extractors.pixels import load_pixels

__all__ = [
    "EXTRACTORS",
    "FeatureArray",
    "FeatureExtractor",
    "JointExtractor",
    "NetworkExtractor",
    "load_extractor",
    "load_extractors",
]

# Each takes the weights, the resolution, the folder for what is fetched, and the device.
EXTRACTORS: dict[str, Callable[[str | None, int | None, Path, torch.device], FeatureExtractor]] = {
    **{mode_name(mode): partial(load_inception, mode=mode) for mode in get_args(ExtractorMode)},
    "efficientnet_lite0": partial(load_efficientnet, size=0),
    "efficientnet_lite2": partial(load_efficientnet, size=2),
    "dinov2_vitl14": load_dinov2,
    "clip_vit_b_32": load_clip,
    "pixels_4x4": load_pixels,
}
assert EXTRACTORS.keys() == set(EXTRACTOR_NAMES)


def load_extractor(
    name: str, *, weights: str | None = None, resolution: int | None = None, cache: Path, device: torch.device | str
) -> FeatureExtractor:
    """Load a feature extractor; weights that cannot be had are an ExtractorUnavailableError.

    Without weights given, 'inception' is downloaded from where clean-fid has it, once per cache, 'dinov2_vitl14' and
    'clip_vit_b_32' by the hub's client into its own cache; the EfficientNets and 'pixels_4x4' reach nothing outside.

    Args:
        name: one of EXTRACTORS.
        weights: path or object-store URI of the weights; default the library's own. What a URI names is
            fetched once per cache. A folder for clip_vit_b_32, one file for the others.
        resolution: side images are resized to, for the EfficientNets; default 224, or 260 for the larger.
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


def load_extractors(
    names: Sequence[str], *, weights: str | None, resolution: int | None, cache: Path, device: torch.device | str
) -> FeatureExtractor:
    """Load one extractor, or several as a `JointExtractor`.

    Args:
        names: of EXTRACTORS, the first being the one that decides.
        weights: of the first, see `load_extractor`; the others have their library's own.
        resolution: side images are resized to, for the EfficientNets and the first.
        cache: folder for weights that have to be fetched.
        device: where the networks run.
    """
    first, *others = names
    extractors = [load_extractor(first, weights=weights, resolution=resolution, cache=cache, device=device)]
    for name in others:
        own = resolution if name in OF_ANY_RESOLUTION else None
        extractors.append(load_extractor(name, resolution=own, cache=cache, device=device))
    return JointExtractor(extractors) if others else extractors[0]
