"""The two Inception-V3 networks that clean-fid knows, built from local files by clean-fid's own classes.

NVIDIA's TorchScript file holds the network of the original FID; pytorch-fid's state dict is a port of it to
torchvision's layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

_TORCHSCRIPT = "inception-2015-12-05.pt"  # the name clean-fid gives and expects
_PYTORCH = "pt_inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class InceptionFile:
    """A published file of weights, and the network that a mode makes of it.

    Attributes:
        name: as it is published.
        build: the network of such a file, in eval mode, on the CPU, from float32 pixels (B, 3, H, W) in 0..255
            to (B, 2048).
        download: fetches the file into a folder and returns its path.
    """

    name: str
    build: Callable[[Path], torch.nn.Module]
    download: Callable[[Path], Path]


class PytorchInception(torch.nn.Module):
    """pytorch-fid's network, called as clean-fid calls it: pixels (B, 3, 299, 299) in 0..255 to (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        from cleanfid.inception_pytorch import InceptionV3

        self.inception = InceptionV3(output_blocks=[3], resize_input=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of the last average pooling."""
        features: torch.Tensor = self.inception(pixels / 255)[0].squeeze(-1).squeeze(-1)
        return features


def _build_torchscript(path: Path, *, resize_inside: bool) -> torch.nn.Module:
    from cleanfid.inception_torchscript import InceptionV3W

    with TemporaryDirectory() as named:  # clean-fid takes a folder, and fixes the file's name
        (Path(named) / _TORCHSCRIPT).symlink_to(path.resolve())
        network: torch.nn.Module = InceptionV3W(named, download=False, resize_inside=resize_inside).eval()
        return network


def _download_torchscript(folder: Path) -> Path:
    from cleanfid.downloads_helper import check_download_inception

    return Path(check_download_inception(fpath=folder))


def _build_pytorch(path: Path) -> torch.nn.Module:
    with _weights_from(path):
        return PytorchInception().eval()


def _download_pytorch(folder: Path) -> Path:
    """The name that clean-fid gives holds the first digits of the file's SHA-256, which are checked."""
    from cleanfid import inception_pytorch

    url = inception_pytorch.FID_WEIGHTS_URL
    torch.hub.load_state_dict_from_url(url, model_dir=str(folder), progress=False, check_hash=True, weights_only=True)
    return folder / url.rpartition("/")[2]


@contextmanager
def _weights_from(path: Path) -> Iterator[None]:
    """Let clean-fid's class, which would download a pickle and trust it, read a file without running its code."""
    from cleanfid import inception_pytorch

    fetch = inception_pytorch.load_state_dict_from_url
    inception_pytorch.load_state_dict_from_url = lambda *_, **__: torch.load(
        path, map_location="cpu", weights_only=True
    )
    try:
        yield
    finally:
        inception_pytorch.load_state_dict_from_url = fetch


# As clean-fid's build_feature_extractor has them.
NETWORKS = {
    "clean": InceptionFile(_TORCHSCRIPT, partial(_build_torchscript, resize_inside=False), _download_torchscript),
    "legacy_pytorch": InceptionFile(_PYTORCH, _build_pytorch, _download_pytorch),
    "legacy_tensorflow": InceptionFile(
        _TORCHSCRIPT, partial(_build_torchscript, resize_inside=True), _download_torchscript
    ),
}
