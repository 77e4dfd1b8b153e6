"""A part of a data set: what training sees, and what is held out from it."""

from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

import torch

from deme_core.digests import json_digest
from deme_core.errors import DatasetError
from deme_core.images.dataset import ImageDataset, ResizedImage
from deme_core.images.stream import Stream
from deme_core.seeds import generator

T = TypeVar("T")

_MAX_HELDOUT = 500


class ImageSubset:
    """The images ``indices`` of a data set, renumbered from 0."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int]) -> None:
        self.resolution, self.channels = dataset.resolution, dataset.channels
        self.num_skipped = dataset.num_skipped
        self.captions, self.labels = _picked(dataset.captions, indices), _picked(dataset.labels, indices)
        self.dataset, self._indices = dataset, list(indices)
        self.stream: Stream | None = None if dataset.stream is None else dataset.stream.subset(self._indices)

    @property
    def indices(self) -> Sequence[int]:
        """Numbers of the images in the whole data set."""
        return self._indices

    def __len__(self) -> int:
        return len(self._indices)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the examples and of their augmentation."""
        return json_digest([self.dataset.fingerprint, self._indices])

    @cached_property
    def example_fingerprint(self) -> str:
        """Identity of images, captions and labels."""
        return json_digest([self.dataset.example_fingerprint, self._indices])

    @cached_property
    def reference_fingerprint(self) -> str:
        """Identity of what ``image`` returns."""
        return json_digest([self.dataset.reference_fingerprint, self._indices])

    def image(self, index: int) -> torch.Tensor:
        """One image, centre-cropped: uint8 (C, resolution, resolution)."""
        return self.dataset.image(self._indices[index])

    def resized(self, index: int) -> ResizedImage:
        """One image before it is cropped."""
        return self.dataset.resized(self._indices[index])


def _picked(values: Sequence[T] | None, indices: Sequence[int]) -> list[T] | None:
    return None if values is None else [values[index] for index in indices]


def num_heldout_of(num_images: int, wanted: int | None) -> int:
    """Returns how many of so many images are held out from training.

    Args:
        num_images: images in all.
        wanted: as asked for; None for a tenth, at least 2 (for an interval) and at most 500.

    Raises:
        DatasetError: nothing would be left for training.
    """
    num_heldout = min(max(num_images // 10, 2), _MAX_HELDOUT) if wanted is None else wanted
    if num_heldout >= num_images:
        raise DatasetError(
            f"dataset.num_heldout_images {num_heldout} leaves none of the {num_images} images for training; lower it."
        )
    return num_heldout


def split_heldout(dataset: ImageDataset, num_heldout: int | None) -> tuple[ImageSubset, ImageSubset]:
    """Divides a data set into what training sees and what it never sees.

    Args:
        dataset: all images.
        num_heldout: how many are held out, as `num_heldout_of` has it.

    Returns:
        The images for training, and those held out.

    Raises:
        DatasetError: nothing would be left for training.
    """
    num_images = len(dataset)
    wanted = num_heldout_of(num_images, num_heldout)
    order = torch.randperm(num_images, generator=generator("heldout", num_images))
    heldout, training = sorted(order[:wanted].tolist()), sorted(order[wanted:].tolist())
    return ImageSubset(dataset, training), ImageSubset(dataset, heldout)
