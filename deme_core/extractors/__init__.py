"""Feature extractors: images in, one feature vector per image out.

Features of two extractors are never comparable; `FeatureExtractor.digest` tells extractors apart, by all that
changes the features: weights, resolution and preprocessing.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from deme_core.extractor_names import EXTRACTOR_NAMES, OF_ANY_RESOLUTION, ExtractorMode, mode_name
from deme_core.extractors.base import FeatureArray, FeatureExtractor, NetworkExtractor
from deme_core.extractors.clip import clip_digest, load_clip
from deme_core.extractors.dinov2 import dinov2_digest, load_dinov2
from deme_core.extractors.efficientnet_lite import efficientnet_digest, load_efficientnet
from deme_core.extractors.inception import inception_digest, load_inception
from deme_core.extractors.joint import JointExtractor, joint_digest
from deme_core.extractors.pixels import load_pixels, pixels_digest

__all__ = [
    "EXTRACTORS",
    "FeatureArray",
    "FeatureExtractor",
    "JointExtractor",
    "NetworkExtractor",
    "extractors_digest",
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
# Each takes the same but the device, and loads no network.
_DIGESTS: dict[str, Callable[[str | None, int | None, Path], str]] = {
    **{mode_name(mode): partial(inception_digest, mode=mode) for mode in get_args(ExtractorMode)},
    "efficientnet_lite0": partial(efficientnet_digest, size=0),
    "efficientnet_lite2": partial(efficientnet_digest, size=2),
    "dinov2_vitl14": dinov2_digest,
    "clip_vit_b_32": clip_digest,
    "pixels_4x4": pixels_digest,
}
assert EXTRACTORS.keys() == _DIGESTS.keys() == set(EXTRACTOR_NAMES)


def load_extractor(
    name: str, *, weights: str | None = None, resolution: int | None = None, cache: Path, device: torch.device | str
) -> FeatureExtractor:
    """Load a feature extractor; weights that cannot be had are an ExtractorUnavailableError.

    Without weights given, 'inception' is downloaded from where clean-fid has it, once per cache, 'dinov2_vitl14' and
    'clip_vit_b_32' by the hub's client into its own cache; the EfficientNets and 'pixels_4x4' reach nothing outside.

    Args:
        name: one of EXTRACTORS.
        weights: path or object-store URI of the weights; default the library's own. What a URI names is
            fetched once for each version of it. A folder for clip_vit_b_32, one file for the others.
        resolution: side images are resized to, for the EfficientNets; default 224, or 260 for the larger.
            The other networks take their own alone; pixels_4x4 ignores it.
        cache: folder for weights that have to be fetched; may be deleted at any time.
        device: where the network runs.

    Returns:
        The extractor, its weights loaded.

    Raises:
        ValueError: for an unknown name, weights of pixels_4x4, or a resolution that the network is not defined at.
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
    extractors = [
        load_extractor(name, weights=own_weights, resolution=own_resolution, cache=cache, device=device)
        for name, own_weights, own_resolution in _each(names, weights, resolution)
    ]
    return JointExtractor(extractors) if len(extractors) > 1 else extractors[0]


def extractors_digest(names: Sequence[str], *, weights: str | None, resolution: int | None, cache: Path) -> str:
    """Returns the digest of what `load_extractors` would load, without the time and memory that it takes."""
    digests = [
        _DIGESTS[name](own_weights, own_resolution, cache / "extractors")
        for name, own_weights, own_resolution in _each(names, weights, resolution)
    ]
    return joint_digest(digests) if len(digests) > 1 else digests[0]


def _each(
    names: Sequence[str], weights: str | None, resolution: int | None
) -> Iterator[tuple[str, str | None, int | None]]:
    """Yields each name with its weights and its resolution."""
    for index, name in enumerate(names):
        is_first = index == 0
        yield name, weights if is_first else None, resolution if is_first or name in OF_ANY_RESOLUTION else None
