"""Squares cut out of the images of a data set, with what SDXL is told of their sizes."""

from dataclasses import dataclass, fields
from typing import Protocol

import torch

from deme_core.images.dataset import ImageDataset
from deme_core.images.pixels import center_corner, crop, random_corner


@dataclass(frozen=True, eq=False)
class Squares:
    """B squares.

    Attributes:
        pixels: uint8 (B, C, R, R), 0..255.
        original_sizes: height and width of the images as they are stored, int64 (B, 2).
        corners: top and left of the square in the resized image, int64 (B, 2).
        resized_widths: width of the resized image, int64 (B,).
    """

    pixels: torch.Tensor
    original_sizes: torch.Tensor
    corners: torch.Tensor
    resized_widths: torch.Tensor


def mirrored_corners(
    corners: torch.Tensor, resized_widths: torch.Tensor, mirrored: torch.Tensor, resolution: int
) -> torch.Tensor:
    """Returns top and left of squares, int64 (B, 2), in their image as it is mirrored or not.

    Args:
        corners: in the image that is not mirrored, int64 (B, 2).
        resized_widths: widths of the images, int64 (B,).
        mirrored: which images are, bool (B,).
        resolution: side of the squares.
    """
    top, left = corners.unbind(1)
    return torch.stack([top, torch.where(mirrored, resized_widths - resolution - left, left)], dim=1)


class Cropper(Protocol):
    """Cuts squares out of the images of a data set."""

    def gather(self, indices: torch.Tensor, draws: torch.Tensor) -> Squares:
        """Returns a square of each image, int64 (B,); ``draws`` in [0, 1), (B, 2), may place it from top and left."""
        ...


class Crops:
    """Squares of images that are decoded anew each time: middle ones, or anywhere."""

    def __init__(self, dataset: ImageDataset, *, random_crop: bool) -> None:
        self._dataset, self._random_crop = dataset, random_crop

    def gather(self, indices: torch.Tensor, draws: torch.Tensor) -> Squares:
        """Returns a square of each image."""
        images = [self._dataset.resized(index) for index in indices.tolist()]
        side = self._dataset.resolution
        corners = [
            random_corner(image.pixels, draw, side) if self._random_crop else center_corner(image.pixels, side)
            for image, draw in zip(images, draws.tolist(), strict=True)
        ]
        return Squares(
            torch.stack([crop(image.pixels, corner, side) for image, corner in zip(images, corners, strict=True)]),
            torch.tensor([image.original_size for image in images]),
            torch.tensor(corners),
            torch.tensor([image.pixels.shape[2] for image in images]),
        )


class CropsInMemory:
    """Middle squares, each decoded when it is first asked for and then kept."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._crops = Crops(dataset, random_crop=False)
        side, num_images = dataset.resolution, len(dataset)
        self._kept = Squares(
            torch.empty((num_images, dataset.channels, side, side), dtype=torch.uint8),
            torch.empty((num_images, 2), dtype=torch.int64),
            torch.empty((num_images, 2), dtype=torch.int64),
            torch.empty(num_images, dtype=torch.int64),
        )
        self._decoded = torch.zeros(num_images, dtype=torch.bool)

    def gather(self, indices: torch.Tensor, draws: torch.Tensor) -> Squares:
        """Returns the middle square of each image."""
        names = [field.name for field in fields(Squares)]
        # One after the other: what is decoded needs no second copy in memory.
        for index in indices[~self._decoded[indices]].unique():
            square = self._crops.gather(index[None], draws[:1])
            for name in names:
                getattr(self._kept, name)[index] = getattr(square, name)[0]
            self._decoded[index] = True
        return Squares(*(getattr(self._kept, name).index_select(0, indices) for name in names))
