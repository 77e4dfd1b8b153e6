"""What the extractors share: the protocol, the network with its preprocessing, digests and weight files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from deme_core.digests import json_digest, sha256_file
from deme_core.downloads import download_once, listing_version
from deme_core.errors import ArtifactNotFoundError, ExtractorUnavailableError, InputError, StoreUnavailableError
from deme_core.local_files import user_path
from deme_core.store import ObjectStore, folder_and_key, open_store
from deme_core.tf32 import without_tf32

# A CPU is fastest where activations fit its cache (64 images at 64 pixels); a GPU wants more at once.
_PIXELS_PER_CHUNK_CPU, _PIXELS_PER_CHUNK_GPU = 2**18, 2**21

FeatureArray = npt.NDArray[np.float32]


class FeatureExtractor(Protocol):
    """Turns images into feature vectors."""

    @property
    def name(self) -> str:
        """Which extractor: one of `deme_core.extractors.EXTRACTORS`."""
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
        with without_tf32():
            chunks = [self.network(self.prepare(chunk)).float().cpu() for chunk in images.split(self.chunk_size)]
        return torch.cat(chunks).numpy()


@dataclass(frozen=True)
class TimmWeights:
    """What makes an extractor of one of timm's networks, but for the network: enough to tell it from others.

    Attributes:
        name: which extractor.
        path: file of the weights.
        resolution: side that images are resized to, bicubically, antialiased.
        mean, std: how the network's weights want images in 0..1 standardised.
        positions: what becomes of the network's positions.
    """

    name: str
    path: Path
    resolution: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    positions: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over all of it."""
        preprocessing = f"bicubic, antialiased, clipped to 0..255; mean {self.mean}, std {self.std}{self.positions}"
        return digest(self.name, self.path, resolution=self.resolution, preprocessing=preprocessing)

    def extractor(
        self, network: Any, device: torch.device, memory_format: torch.memory_format = torch.preserve_format
    ) -> NetworkExtractor:
        """The extractor of these weights.

        Args:
            network: timm's, without a head, in eval mode, on the CPU.
            device: where it shall run.
            memory_format: how its weights shall lie in memory.
        """
        told = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
        if told != (self.mean, self.std):
            raise AssertionError(f"timm standardises images of {self.name} by {told}.")
        return NetworkExtractor(
            name=self.name,
            digest=self.digest,
            num_features=network.num_features,
            chunk_size=chunk_size(self.resolution, device),
            prepare=partial(
                resize_and_normalize,
                resolution=self.resolution,
                mean=per_channel(self.mean, device),
                std=per_channel(self.std, device),
            ),
            network=network.to(device, memory_format=memory_format),
        )


def resize_and_normalize(
    images: torch.Tensor, *, resolution: int, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Square float32 images on the device of the mean: bicubic, antialiased, clipped to 0..255, standardised."""
    size = (resolution, resolution)
    pixels = torch.nn.functional.interpolate(images.to(mean.device).float(), size=size, mode="bicubic", antialias=True)
    return standardize(pixels.clamp(0, 255), mean=mean, std=std)


def standardize(pixels: torch.Tensor, *, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Pixels (B, C, H, W) in 0..255, standardised; subtracting the mean of three channels repeats a grey one."""
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def per_channel(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """A mean or deviation of pixels in 0..1, as (3, 1, 1) for pixels in 0..255."""
    return 255 * torch.tensor(values, device=device).view(3, 1, 1)


def local_file(weights: str, folder: Path, mend: str) -> Path:
    """A path as it is, or what an object-store URI names, fetched into the folder."""
    if "://" not in weights:
        if not (path := user_path(weights)).is_file():
            raise unavailable(f"The extractor's weights {weights} do not exist", mend)
        return path
    parent, key = folder_and_key(weights)
    path = fetched(parent, [key], folder, mend) / key
    if not path.is_file():
        raise unavailable(f"The extractor's weights {weights} cannot be had (there is no such object)", mend)
    return path


def fetched(uri: str, keys: Sequence[str], folder: Path, mend: str) -> Path:
    """Those objects that there are of these below a URI, in a folder of their version, looked at once per process.

    So what is loaded is what the digest was computed of, whatever is put behind the URI between the two.
    """
    asked = uri, tuple(keys), folder
    if asked in _FETCHED and all((_FETCHED[asked] / key).is_file() for key in keys):
        return _FETCHED[asked]
    store = _store_of_weights(uri, mend)
    try:
        objects = [item for item in store.list(keys[0] if len(keys) == 1 else "") if item.key in keys]
        _FETCHED[asked] = download_once(store, objects, folder / listing_version(uri, objects))
    except StoreUnavailableError:  # It may pass, and is tried again.
        raise
    except (ArtifactNotFoundError, InputError) as error:
        raise unavailable(f"The extractor's weights {uri} cannot be had ({str(error).rstrip('.')})", mend) from error
    return _FETCHED[asked]


_FETCHED: dict[tuple[str, tuple[str, ...], Path], Path] = {}


def _store_of_weights(uri: str, mend: str) -> ObjectStore:
    """The object store that a URI of weights names, which is not repeated: it may be another's, with a password."""
    try:
        return open_store(uri)
    except StoreUnavailableError:  # It may pass, and is tried again.
        raise
    except InputError as error:
        raise unavailable("The extractor's weights cannot be had from such an address", mend) from error


def read_safetensors(path: Path, mend: str) -> dict[str, torch.Tensor]:
    """The tensors of a file; pickles, which can run code, are refused like damaged files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise unavailable(f"{path} is no whole safetensors file, and no other kind is read", mend) from error


def fixed_resolution(name: str, resolution: int | None, only: int) -> int:
    """The one resolution an extractor is defined at; an InputError if another is asked for."""
    if resolution not in (None, only):
        raise InputError(
            f"evaluate.extractor_resolution: {name} is defined at {only} pixels only, not {resolution}; leave it null."
        )
    return only


def chunk_size(resolution: int, device: torch.device) -> int:
    """How many images pass through a network together."""
    pixels = _PIXELS_PER_CHUNK_CPU if device.type == "cpu" else _PIXELS_PER_CHUNK_GPU
    return max(1, pixels // resolution**2)


def digest(name: str, path: Path, **preprocessing: Any) -> str:
    """Hexadecimal SHA-256 over an extractor's name, its file of weights and its preprocessing."""
    return json_digest({"name": name, "weights": sha256_file(path), **preprocessing})


def unavailable(cause: str, mend: str) -> ExtractorUnavailableError:
    """The error for weights that cannot be had, in one sentence: the cause, and what the user can do."""
    return ExtractorUnavailableError(f"{cause}; {mend}.")
