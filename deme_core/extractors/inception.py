"""Inception-V3 as clean-fid runs it in each of its modes: the features of FID and KID."""

import socket
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from deme_core.extractor_names import FIXED_SIDES, ExtractorMode, mode_name
from deme_core.extractors import pillow_bicubic
from deme_core.extractors.base import NetworkExtractor, chunk_size, digest, fixed_resolution, local_file, unavailable
from deme_core.extractors.inception_networks import NETWORKS, InceptionFile
from deme_core.local_files import local_errors

NAME: Final = "inception"
_RESOLUTION = FIXED_SIDES[NAME]
_DOWNLOAD_TIMEOUT_SEC = 30.0
Resizer = Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]]


def load_inception(
    weights: str | None, resolution: int | None, folder: Path, device: torch.device, *, mode: ExtractorMode = "clean"
) -> NetworkExtractor:
    """Load Inception from a file, or from clean-fid's download; its features depend on the mode.

    Args:
        weights: path or URI; a TorchScript file, for legacy_pytorch pytorch-fid's state dict.
        resolution: None or 299.
        folder: where what is fetched is kept.
        device: where the network runs.
        mode: one of clean-fid's: ``clean`` resizes bicubically with PIL, ``legacy_pytorch`` bilinearly and without
            antialiasing, with another network; ``legacy_tensorflow`` inside of the network.

    Returns:
        The extractor, called ``inception`` in mode clean and ``inception_MODE`` in the others.
    """
    path = _find(weights, resolution, folder, mode)
    network = _network(NETWORKS[mode], path, folder)
    return NetworkExtractor(
        name=mode_name(mode),
        digest=_digest(path, mode),
        num_features=2048,
        chunk_size=chunk_size(_RESOLUTION, device),
        prepare=(
            partial(resize_on_device, device=device)
            if mode == "clean" and device.type != "cpu"
            else partial(_resize_as_cleanfid, resize=_resizer(mode), device=device)
        ),
        network=network.to(device),
    )


def inception_digest(
    weights: str | None, resolution: int | None, folder: Path, *, mode: ExtractorMode = "clean"
) -> str:
    """Returns the digest of what `load_inception` would load, without the time and memory that it takes."""
    return _digest(_find(weights, resolution, folder, mode), mode)


def _find(weights: str | None, resolution: int | None, folder: Path, mode: ExtractorMode) -> Path:
    fixed_resolution(NAME, resolution, _RESOLUTION)
    file = NETWORKS[mode]
    return local_file(weights, folder, _mend(file)) if weights else _download(file, folder)


def _digest(path: Path, mode: ExtractorMode) -> str:
    return digest(NAME, path, resolution=_RESOLUTION, preprocessing=f"clean-fid mode {mode}")


def _mend(file: InceptionFile) -> str:
    return (
        f"set evaluate.extractor_weights to the path or object-store URI of a whole {file.name}, "
        "or evaluate.extractor to efficientnet_lite0"
    )


def _network(file: InceptionFile, path: Path, folder: Path) -> torch.nn.Module:
    """Load clean-fid's network; a damaged file in our own folder is removed, so that it is fetched again."""
    try:
        return file.build(path)
    except (RuntimeError, AttributeError, TypeError, ValueError, OSError, EOFError, UnpicklingError) as error:
        if path.is_relative_to(folder):
            path.unlink(missing_ok=True)
        raise unavailable(f"The Inception weights {path} are damaged or of another kind", _mend(file)) from error


def _resizer(mode: str) -> Resizer:
    from cleanfid.resize import build_resizer

    with warnings.catch_warnings():  # clean-fid would silence all warnings of the process
        resize: Resizer = build_resizer(mode)
    return resize


def resize_on_device(images: torch.Tensor, *, device: torch.device) -> torch.Tensor:
    """Returns what clean-fid's mode clean makes of uint8 images (B, C, H, W): float32 (B, 3, 299, 299)."""
    resized = pillow_bicubic.resize(images.to(device).float(), _RESOLUTION)
    return resized.clamp(0, 255).expand(-1, 3, -1, -1).contiguous()


def _resize_as_cleanfid(images: torch.Tensor, *, resize: Resizer, device: torch.device) -> torch.Tensor:
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    # PIL works outside of Python's lock.
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(pixels))) as threads:
        resized = np.stack(list(threads.map(resize, pixels)))
    # Channels last in memory, as pixels come: convolutions on a CPU are a quarter faster than with clean-fid's order.
    prepared = torch.from_numpy(resized).permute(0, 3, 1, 2)
    # clean-fid divides and multiplies what no resizer has made float, which costs some values their last bit.
    prepared = prepared if prepared.is_floating_point() else prepared / 255 * 255
    return prepared if device.type == "cpu" else prepared.contiguous().to(device)


def _download(file: InceptionFile, folder: Path) -> Path:
    """Fetch as clean-fid does, which would later take an interrupted download as whole: check, then rename."""
    path = folder / file.name
    if path.is_file():
        return path
    with local_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as partial_folder:
        try:
            with _network_timeout(_DOWNLOAD_TIMEOUT_SEC):
                downloaded = file.download(Path(partial_folder))
        except (OSError, HTTPException) as error:
            raise unavailable(f"The Inception weights cannot be downloaded ({error})", _mend(file)) from error
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise unavailable("The Inception weights were damaged on their way here", _mend(file)) from error
        _network(file, downloaded, folder)
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
