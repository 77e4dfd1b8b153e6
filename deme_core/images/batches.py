"""Training batches: an endless stream that any batch number resumes, bit for bit."""

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from deme_core.errors import DatasetError
from deme_core.images.dataset import ImageDataset
from deme_core.images.pixels import center_corner, crop, random_corner
from deme_core.images.training_batch import TrainingBatch
from deme_core.seeds import generator

MAX_BYTES_IN_MEMORY = 256 * 2**20


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 images, 0..255, to float32 in [-1, 1]; the shape stays."""
    return images.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


class TrainingBatches:
    """Batches ``start_batch``, ``start_batch`` + 1, … of an endless stream of shuffled epochs.

    Batch k is a pure function of the data set, ``batch_size``, ``seed``, the augmentation and k. Each
    epoch is a permutation of its own; batches are cut from their concatenation, so they all have ``batch_size`` images.
    The global random generators are neither read nor moved.

    Args:
        dataset: the images.
        batch_size: images per batch.
        seed: names the stream.
        random_crop: cut out any square that the shorter side allows; otherwise the middle one.
        random_flip: mirror half of the images left to right.
        caption_dropout: chance that a caption is replaced by the empty one.
        start_batch: number of the first batch to yield.
        num_workers: processes that decode ahead; 0 decodes in this one. A small set without random crops is instead
            decoded once and kept in memory.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        seed: int,
        random_crop: bool,
        random_flip: bool,
        caption_dropout: float = 0.0,
        start_batch: int = 0,
        num_workers: int = 0,
    ) -> None:
        if batch_size < 1 or start_batch < 0 or num_workers < 0:
            raise ValueError(f"{batch_size=} must be at least 1, {start_batch=} and {num_workers=} at least 0")
        self.start_batch, self.num_workers = start_batch, num_workers
        num_bytes = len(dataset) * dataset.channels * dataset.resolution**2
        self._in_memory = not random_crop and num_bytes <= MAX_BYTES_IN_MEMORY
        cropper = _CropsInMemory(dataset) if self._in_memory else _Crops(dataset, random_crop)
        self._stream = _Stream(cropper, batch_size, seed, random_flip, caption_dropout)

    def __iter__(self) -> Iterator[TrainingBatch]:
        numbers = itertools.count(self.start_batch)
        in_process = self._in_memory or not self.num_workers
        with closing(self._decode(numbers) if in_process else self._load(numbers)) as batches:
            for batch in batches:
                if isinstance(batch, DatasetError):
                    raise batch
                # Here and not in a worker process, which would have four times as many bytes to hand over.
                yield replace(batch, clean_images=normalize(batch.clean_images))

    def _decode(self, numbers: Iterator[int]) -> Generator[TrainingBatch | DatasetError, None, None]:
        yield from map(self._stream.__getitem__, numbers)

    def _load(self, numbers: Iterator[int]) -> Generator[TrainingBatch | DatasetError, None, None]:
        # Without a generator of its own a DataLoader draws from the global one.
        batches: Any = iter(
            DataLoader(
                self._stream,
                batch_size=None,
                sampler=numbers,
                num_workers=self.num_workers,
                generator=generator("data workers"),
            )
        )
        try:
            yield from batches
        finally:
            # Not when the garbage collector comes by, which may take ten seconds. A process that fails while it is
            # being dismissed has nothing left to do: whatever went wrong before was raised above.
            with suppress(RuntimeError):
                batches._shutdown_workers()


class _Stream(Dataset[TrainingBatch | DatasetError]):
    """Batch by number, its images still uint8. A DataLoader would rewrite an error that is raised: it is returned."""

    def __init__(
        self,
        cropper: "_Crops | _CropsInMemory",
        batch_size: int,
        seed: int,
        random_flip: bool,
        caption_dropout: float,
    ) -> None:
        self._cropper, self._batch_size, self._seed, self._random_flip = cropper, batch_size, seed, random_flip
        self._caption_dropout, self._dataset = caption_dropout, cropper.dataset
        labels = self._dataset.labels
        self._labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)

    def __getitem__(self, number: int) -> TrainingBatch | DatasetError:
        indices = batch_indices(len(self._dataset), self._batch_size, self._seed, number)
        draws = torch.rand((self._batch_size, 3), dtype=torch.float64, generator=generator("crops", self._seed, number))
        try:
            squares = self._cropper.gather(indices, draws[:, :2])
        except DatasetError as error:
            return error
        images, corners = squares.pixels, squares.corners
        if self._random_flip:
            mirrored = draws[:, 2] < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            from_right = squares.resized_widths - self._dataset.resolution - corners[:, 1]
            corners = torch.stack([corners[:, 0], torch.where(mirrored, from_right, corners[:, 1])], dim=1)
        return TrainingBatch(
            images,
            self._captions(indices, number),
            None if self._labels is None else self._labels[indices],
            squares.original_sizes,
            corners,
            torch.full((self._batch_size, 2), self._dataset.resolution),
        )

    def _captions(self, indices: torch.Tensor, number: int) -> tuple[str, ...] | None:
        captions = self._dataset.captions
        if captions is None:
            return None
        dropped = dropped_captions(self._batch_size, self._caption_dropout, self._seed, number)
        return tuple(
            "" if drop else captions[index] for index, drop in zip(indices.tolist(), dropped.tolist(), strict=True)
        )


def dropped_captions(batch_size: int, caption_dropout: float, seed: int, number: int) -> torch.Tensor:
    """Which captions of batch ``number`` are replaced by the empty one: bool (batch_size,)."""
    draws = torch.rand(batch_size, dtype=torch.float64, generator=generator("captions", seed, number))
    return draws < caption_dropout


def batch_indices(num_images: int, batch_size: int, seed: int, number: int) -> torch.Tensor:
    """Images of batch ``number``: int64 (batch_size,), a piece of the concatenated epochs."""
    first, last = number * batch_size, (number + 1) * batch_size
    epochs = range(first // num_images, (last - 1) // num_images + 1)
    order = torch.cat([_epoch_order(num_images, seed, epoch) for epoch in epochs])
    start = first - epochs.start * num_images
    return order[start : start + batch_size]


@lru_cache(maxsize=4)
def _epoch_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(num_images, generator=generator("epoch", seed, epoch))


@dataclass(frozen=True, eq=False)
class _Squares:
    """Squares cut out of resized images; sizes and corners as in `TrainingBatch`.

    Attributes:
        pixels: uint8 (B, C, R, R).
        resized_widths: of the images before they were cut, int64 (B,).
    """

    pixels: torch.Tensor
    original_sizes: torch.Tensor
    corners: torch.Tensor
    resized_widths: torch.Tensor


class _Crops:
    """Squares of images that are decoded anew each time."""

    def __init__(self, dataset: ImageDataset, random_crop: bool) -> None:
        self.dataset, self._random_crop = dataset, random_crop

    def gather(self, indices: torch.Tensor, draws: torch.Tensor) -> _Squares:
        """Return the squares of images int64 (B,); draws in [0, 1), (B, 2), place a random crop from top and left."""
        images = [self.dataset.resized(index) for index in indices.tolist()]
        side = self.dataset.resolution
        corners = [
            random_corner(image.pixels, draw, side) if self._random_crop else center_corner(image.pixels, side)
            for image, draw in zip(images, draws.tolist(), strict=True)
        ]
        cut = [crop(image.pixels, corner, side) for image, corner in zip(images, corners, strict=True)]
        return _Squares(
            torch.stack(cut),
            torch.tensor([image.original_size for image in images]),
            torch.tensor(corners),
            torch.tensor([image.pixels.shape[2] for image in images]),
        )


class _CropsInMemory:
    """Middle squares, each decoded when it is first asked for and then kept."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset, self._crops = dataset, _Crops(dataset, random_crop=False)
        side, num_images = dataset.resolution, len(dataset)
        self._kept = _Squares(
            torch.empty((num_images, dataset.channels, side, side), dtype=torch.uint8),
            torch.empty((num_images, 2), dtype=torch.int64),
            torch.empty((num_images, 2), dtype=torch.int64),
            torch.empty(num_images, dtype=torch.int64),
        )
        self._decoded = torch.zeros(num_images, dtype=torch.bool)

    def gather(self, indices: torch.Tensor, draws: torch.Tensor) -> _Squares:
        """Return the middle squares of images int64 (B,)."""
        names = [field.name for field in fields(_Squares)]
        # One after the other: what is decoded needs no second copy in memory.
        for index in indices[~self._decoded[indices]].unique():
            square = self._crops.gather(index[None], draws[:1])
            for name in names:
                getattr(self._kept, name)[index] = getattr(square, name)[0]
            self._decoded[index] = True
        return _Squares(*(getattr(self._kept, name).index_select(0, indices) for name in names))
