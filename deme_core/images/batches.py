"""Training batches: an endless stream that any batch number resumes, bit for bit."""

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from deme_core.errors import DatasetError
from deme_core.images.dataset import ImageDataset
from deme_core.seeds import generator

MAX_BYTES_IN_MEMORY = 256 * 2**20


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 images, 0..255, to float32 in [-1, 1]; the shape stays."""
    return images.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


class TrainingBatches:
    """Batches ``start_batch``, ``start_batch`` + 1, … of an endless stream of shuffled epochs.

    Each is float32 (batch_size, C, resolution, resolution), in [-1, 1], on the CPU.

    Batch k is a pure function of the data set, ``batch_size``, ``seed``, ``random_crop``, ``random_flip`` and k. Each
    epoch is a permutation of its own; batches are cut from their concatenation, so they all have ``batch_size`` images.
    The global random generators are neither read nor moved.

    Args:
        dataset: the images.
        batch_size: images per batch.
        seed: names the stream.
        random_crop: cut out any square that the shorter side allows; otherwise the middle one.
        random_flip: mirror half of the images left to right.
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
        start_batch: int = 0,
        num_workers: int = 0,
    ) -> None:
        if batch_size < 1 or start_batch < 0 or num_workers < 0:
            raise ValueError(f"{batch_size=} must be at least 1, {start_batch=} and {num_workers=} at least 0")
        self.start_batch, self.num_workers = start_batch, num_workers
        num_bytes = len(dataset) * dataset.channels * dataset.resolution**2
        self._in_memory = not random_crop and num_bytes <= MAX_BYTES_IN_MEMORY
        cropper = _CropsInMemory(dataset) if self._in_memory else _Crops(dataset, random_crop)
        self._stream = _Stream(cropper, batch_size, seed, random_flip)

    def __iter__(self) -> Iterator[torch.Tensor]:
        numbers = itertools.count(self.start_batch)
        in_process = self._in_memory or not self.num_workers
        with closing(self._decode(numbers) if in_process else self._load(numbers)) as batches:
            for batch in batches:
                if isinstance(batch, DatasetError):
                    raise batch
                yield normalize(batch)

    def _decode(self, numbers: Iterator[int]) -> Generator[torch.Tensor | DatasetError, None, None]:
        yield from map(self._stream.__getitem__, numbers)

    def _load(self, numbers: Iterator[int]) -> Generator[torch.Tensor | DatasetError, None, None]:
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


class _Stream(Dataset[torch.Tensor | DatasetError]):
    """Batch by number: uint8 (B, C, R, R). An error is returned, for a DataLoader would rewrite one that is raised."""

    def __init__(self, cropper: "_Crops | _CropsInMemory", batch_size: int, seed: int, random_flip: bool) -> None:
        self._cropper, self._batch_size, self._seed, self._random_flip = cropper, batch_size, seed, random_flip

    def __getitem__(self, number: int) -> torch.Tensor | DatasetError:
        indices = _indices(self._cropper.num_images, self._batch_size, self._seed, number)
        draws = torch.rand((self._batch_size, 3), dtype=torch.float64, generator=generator("crops", self._seed, number))
        try:
            batch = self._cropper.gather(indices, draws[:, :2])
        except DatasetError as error:
            return error
        if not self._random_flip:
            return batch
        return torch.where(draws[:, 2, None, None, None] < 0.5, batch.flip(-1), batch)


def _indices(num_images: int, batch_size: int, seed: int, number: int) -> torch.Tensor:
    """Images of batch ``number``: int64 (batch_size,), a piece of the concatenated epochs."""
    first, last = number * batch_size, (number + 1) * batch_size
    epochs = range(first // num_images, (last - 1) // num_images + 1)
    order = torch.cat([_epoch_order(num_images, seed, epoch) for epoch in epochs])
    start = first - epochs.start * num_images
    return order[start : start + batch_size]


@lru_cache(maxsize=4)
def _epoch_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(num_images, generator=generator("epoch", seed, epoch))


class _Crops:
    """Squares of images that are decoded anew each time."""

    def __init__(self, dataset: ImageDataset, random_crop: bool) -> None:
        self._dataset, self._random_crop = dataset, random_crop
        self.num_images = len(dataset)

    def gather(self, indices: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return uint8 (B, C, R, R) for int64 (B,) and, in [0, 1), (B, 2) that place a crop from top and left."""
        if not self._random_crop:
            return torch.stack([self._dataset.image(index) for index in indices.tolist()])
        return torch.stack(
            [self._crop(index, *draw) for index, draw in zip(indices.tolist(), draws.tolist(), strict=True)]
        )

    def _crop(self, index: int, down: float, right: float) -> torch.Tensor:
        pixels, side = self._dataset.resized(index), self._dataset.resolution
        top, left = int(down * (pixels.shape[1] - side + 1)), int(right * (pixels.shape[2] - side + 1))
        return pixels[:, top : top + side, left : left + side]


class _CropsInMemory:
    """Middle squares, each decoded when it is first asked for and then kept."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset, self.num_images = dataset, len(dataset)
        side = dataset.resolution
        self._images = torch.empty((self.num_images, dataset.channels, side, side), dtype=torch.uint8)
        self._decoded = torch.zeros(self.num_images, dtype=torch.bool)

    def gather(self, indices: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return uint8 (B, C, R, R) for int64 (B,)."""
        for index in indices[~self._decoded[indices]].unique().tolist():
            self._images[index] = self._dataset.image(index)
            self._decoded[index] = True
        return self._images.index_select(0, indices)
