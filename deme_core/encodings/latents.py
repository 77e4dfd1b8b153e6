"""Latents of a data set's images, and what SDXL is told of their sizes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from deme_core.encodings.row_file import Rows, RowWriter
from deme_core.families import Adapter
from deme_core.images import ImageDataset, normalize
from deme_core.images.squares import Crops, mirrored_corners
from deme_core.images.training_batch import CropSizes
from deme_core.slices import ENCODED_AT_ONCE

_LATENTS, _MIRRORED = "latents", "latents-mirrored"
_SIZES = ("original_sizes", "corners", "resized_widths")


def write_latents(
    folder: Path,
    images: ImageDataset,
    adapter: Adapter,
    *,
    low: int,
    high: int,
    mirrored: bool,
    dtype: torch.dtype = torch.float32,
) -> Iterator[int]:
    """Writes the latents of the middle squares of images [low, high).

    Args:
        folder: where to.
        images: the data set.
        adapter: has the autoencoder.
        low: first image.
        high: end of the images.
        mirrored: write those of the mirrored images too.
        dtype: how latents are stored.

    Yields:
        How many images are done.
    """
    crops = Crops(images, random_crop=False)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(RowWriter(folder / f"{name}.safetensors", high - low, dtype))
            for name in (_LATENTS, *((_MIRRORED,) if mirrored else ()), *_SIZES)
        }
        for start in range(low, high, ENCODED_AT_ONCE):
            indices = torch.arange(start, min(start + ENCODED_AT_ONCE, high))
            squares = crops.gather(indices, torch.zeros(len(indices), 2))
            pixels = normalize(squares.pixels)
            writers[_LATENTS].append(adapter.encode_images(pixels))
            if mirrored:
                writers[_MIRRORED].append(adapter.encode_images(pixels.flip(-1)))
            for name in _SIZES:
                writers[name].append(getattr(squares, name))
            yield int(indices[-1]) + 1 - low


@dataclass(frozen=True, eq=False)
class LatentRows:
    """Some images of a data set as the denoiser knows them.

    Attributes:
        latents: float32 (B, C, H, W).
        sizes: how the images were cut out.
    """

    latents: torch.Tensor
    sizes: CropSizes


class Latents:
    """What `write_latents` wrote of all slices of a data set.

    Args:
        folders: of the slices, in order.
        resolution: side of the images, in pixels.
        mirrored: whether mirrored images are wanted, and so are there.
    """

    def __init__(self, folders: Sequence[Path], *, resolution: int, mirrored: bool) -> None:
        def rows(name: str) -> Rows:
            return Rows([folder / f"{name}.safetensors" for folder in folders])

        self._latents, self._resolution = rows(_LATENTS), resolution
        self._mirrored = rows(_MIRRORED) if mirrored else None
        self._sizes = {name: rows(name) for name in _SIZES}

    def __len__(self) -> int:
        """Number of images."""
        return len(self._latents)

    def gather(self, indices: torch.Tensor, mirrored: torch.Tensor) -> LatentRows:
        """Returns images int64 (B,) of the data set, those that are ``mirrored``, bool (B,), left to right."""
        latents = self._latents[indices]
        if mirrored.any():
            assert self._mirrored is not None, "mirrored latents were not asked for"
            latents[mirrored] = self._mirrored[indices[mirrored]]
        sizes = {name: rows[indices] for name, rows in self._sizes.items()}
        corners = mirrored_corners(sizes["corners"], sizes["resized_widths"], mirrored, self._resolution)
        targets = torch.full((len(indices), 2), self._resolution)
        return LatentRows(latents, CropSizes(sizes["original_sizes"], corners, targets))
