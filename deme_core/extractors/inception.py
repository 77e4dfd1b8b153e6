"""Inception-V3 as clean-fid runs it: the features of FID and KID."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch

from deme_core.extractors.base import (
    FeatureArray,
    NetworkExtractor,
    chunk_size,
    digest,
    fixed_resolution,
    local_file,
    unavailable,
)
from deme_core.store import local_errors

NAME = "inception"
_FILE = "inception-2015-12-05.pt"  # the name clean-fid gives and expects
_RESOLUTION = 299
_MEND = (
    f"set evaluate.extractor_weights to the path or object-store URI of a whole {_FILE}, "
    "or evaluate.extractor to efficientnet_lite0"
)
_DOWNLOAD_TIMEOUT_SEC = 30.0


def load_inception(weights: str | None, resolution: int | None, folder: Path, device: torch.device) -> NetworkExtractor:
    """Load Inception from a TorchScript file, or from clean-fid's download."""
    from cleanfid.resize import build_resizer

    resolution = fixed_resolution(NAME, resolution, _RESOLUTION)
    path = local_file(weights, folder, _MEND) if weights else _download(folder)
    network = _network(path, folder)
    return NetworkExtractor(
        name=NAME,
        digest=digest(NAME, path, resolution=resolution, preprocessing="clean-fid mode clean"),
        num_features=2048,
        chunk_size=chunk_size(resolution, device),
        prepare=partial(_resize_as_cleanfid, resize=build_resizer("clean"), device=device),
        network=network.to(device),
    )


def _network(path: Path, folder: Path) -> torch.nn.Module:
    """Load clean-fid's network; a damaged file in our own folder is removed, so that it is fetched again."""
    from cleanfid.inception_torchscript import InceptionV3W

    with TemporaryDirectory() as named:  # clean-fid takes a folder, and fixes the file's name
        (Path(named) / _FILE).symlink_to(path.resolve())
        try:
            return InceptionV3W(named, download=False).eval()
        except (RuntimeError, AttributeError, ValueError, OSError) as error:
            if path.is_relative_to(folder):
                path.unlink(missing_ok=True)
            raise unavailable(f"The Inception weights {path} are damaged or of another kind", _MEND) from error


def _resize_as_cleanfid(
    images: torch.Tensor, *, resize: Callable[[npt.NDArray[np.uint8]], FeatureArray], device: torch.device
) -> torch.Tensor:
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    resized = np.stack([resize(image) for image in pixels]).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(resized)).to(device)


def _download(folder: Path) -> Path:
    """Fetch through clean-fid, which would later take an interrupted download as whole: check, then rename."""
    from cleanfid.downloads_helper import check_download_inception

    path = folder / _FILE
    if path.is_file():
        return path
    with local_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as partial_folder:
        try:
            with _network_timeout(_DOWNLOAD_TIMEOUT_SEC):
                downloaded = Path(check_download_inception(fpath=partial_folder))
        except (OSError, HTTPException) as error:
            raise unavailable(f"The Inception weights cannot be downloaded ({error})", _MEND) from error
        _network(downloaded, folder)
        downloaded.replace(path)
    return path


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Bound each wait of sockets whose opener sets no timeout, as clean-fid does not."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
