"""DINOv2 ViT-L/14 (Oquab et al. 2023, arXiv 2304.07193): the features of FD-DINOv2 (Stein et al. 2023, 2306.04675)."""

from pathlib import Path
from typing import Any, Final

import torch

from deme_core.extractor_names import FIXED_SIDES
from deme_core.extractors.base import (
    NetworkExtractor,
    TimmWeights,
    fixed_resolution,
    local_file,
    read_safetensors,
    unavailable,
)
from deme_core.extractors.hub import hub_folder

NAME: Final = "dinov2_vitl14"
_TIMM_NAME = "vit_large_patch14_dinov2.lvd142m"
_HUB_ID, _HUB_FILE = f"timm/{_TIMM_NAME}", "model.safetensors"
_RESOLUTION = FIXED_SIDES[NAME]
# ImageNet's, as timm has it for these weights.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MEND = (
    "set evaluate.extractor_weights to the path or object-store URI of a safetensors file of "
    f"{_TIMM_NAME}, with the names of timm or of Meta"
)


def load_dinov2(weights: str | None, resolution: int | None, folder: Path, device: torch.device) -> NetworkExtractor:
    """Load DINOv2 from a safetensors file, or from timm's repository on the hub."""
    return load_vit(weights, resolution, folder, device, timm_name=_TIMM_NAME)


def dinov2_digest(weights: str | None, resolution: int | None, folder: Path) -> str:
    """Returns the digest of what `load_dinov2` would load, without the seconds and gigabytes that it takes."""
    return _find(weights, resolution, folder).digest


def load_vit(
    weights: str | None, resolution: int | None, folder: Path, device: torch.device, *, timm_name: str, **sizes: Any
) -> NetworkExtractor:
    """The same for any of timm's vision transformers.

    Tests load a tiny one. The full size (300 million parameters, 1.2 GB) has been run by hand with random weights only:
    the trained ones could not be had here. Meta's own code resamples the positions a little differently.

    Args:
        weights: path or URI of a safetensors file; default timm's repository of ViT-L/14.
        resolution: None or 224.
        folder: where what a URI names is kept.
        device: where the network runs.
        timm_name: the architecture.
        **sizes: what replaces the architecture's own arguments.

    Returns:
        The extractor: the class token after the last norm.
    """
    found = _find(weights, resolution, folder)
    return found.extractor(_network(found.path, found.resolution, timm_name, **sizes), device)


def _find(weights: str | None, resolution: int | None, folder: Path) -> TimmWeights:
    resolution = fixed_resolution(NAME, resolution, _RESOLUTION)
    path = local_file(weights, folder, _MEND) if weights else hub_folder(_HUB_ID, [_HUB_FILE], _MEND) / _HUB_FILE
    return TimmWeights(NAME, path, resolution, _MEAN, _STD, positions="; positions resampled by timm")


def _network(path: Path, resolution: int, timm_name: str, **sizes: Any) -> Any:
    """Timm's network with every tensor from the file; positions of another image size are resampled."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    # Without a head, what timm returns is the class token after the norm.
    network = timm.create_model(
        timm_name, pretrained=False, img_size=resolution, dynamic_img_size=False, num_classes=0, **sizes
    )
    # Meta's names are timm's, with a token besides that only its training uses.
    tensors = {name: tensor for name, tensor in read_safetensors(path, _MEND).items() if name != "mask_token"}
    # timm would resample patches of another size as well: another network under the same name.
    if _shapes(tensors) != _shapes(network.state_dict()):
        raise unavailable(f"{path} does not hold the tensors of {timm_name}", _MEND)
    try:
        network.load_state_dict(checkpoint_filter_fn(tensors, network))
    except (RuntimeError, ValueError) as error:
        raise unavailable(f"{path} holds positions of no square image", _MEND) from error
    return network.eval()


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor; of the positions, all but their number."""
    return {name: tensor[:, 0].shape if name == "pos_embed" else tensor.shape for name, tensor in tensors.items()}
