"""The names of feature extractors, for what must not import torch: recipes, and the names of scores."""

from typing import Literal, get_args

ExtractorName = Literal[
    "inception", "efficientnet_lite0", "efficientnet_lite2", "dinov2_vitl14", "clip_vit_b_32", "pixels_4x4"
]
ExtractorMode = Literal["clean", "legacy_pytorch", "legacy_tensorflow"]

# The side in pixels that images are resized to, of those that are defined at one; pixels_4x4 resizes nothing.
FIXED_SIDES: dict[ExtractorName, int] = {"inception": 299, "dinov2_vitl14": 224, "clip_vit_b_32": 224}
OF_ANY_RESOLUTION: tuple[ExtractorName, ...] = ("efficientnet_lite0", "efficientnet_lite2")


def mode_name(mode: ExtractorMode) -> str:
    """Returns what Inception is called in one of clean-fid's modes: features of two modes cannot be compared."""
    return "inception" if mode == "clean" else f"inception_{mode}"


INCEPTION_NAMES = tuple(mode_name(mode) for mode in get_args(ExtractorMode))
EXTRACTOR_NAMES = tuple(
    dict.fromkeys(
        loaded for name in get_args(ExtractorName) for loaded in (INCEPTION_NAMES if name == "inception" else (name,))
    )
)
