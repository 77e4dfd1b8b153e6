"""Training batches: an endless stream that any batch number resumes, bit for bit."""

import itertools
import multiprocessing
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from deme_core.data_parallel import current_share
from deme_core.errors import DemeError
from deme_core.images.dataset import ImageDataset
from deme_core.images.draws import BatchDraws, BatchSchedule
from deme_core.images.squares import Cropper, Crops, CropsInMemory, mirrored_corners
from deme_core.images.training_batch import NO_LABEL, CropSizes, TrainingBatch
from deme_core.seeds import generator

MAX_BYTES_IN_MEMORY = 256 * 2**20


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 images, 0..255, to float32 in [-1, 1]; the shape stays."""
    return images.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


def fits_in_memory(dataset: ImageDataset, *, random_crop: bool) -> bool:
    """Returns whether the squares that training takes are so small and so few that each is decoded once."""
    num_bytes = len(dataset) * dataset.channels * dataset.resolution**2
    return not random_crop and num_bytes <= MAX_BYTES_IN_MEMORY and dataset.stream is None


class TrainingBatches:
    """Batches ``start_batch``, ``start_batch`` + 1, … of an endless stream of shuffled epochs.

    Batch k is a pure function of the data set, ``batch_size``, ``seed``, the augmentation and k: see `BatchSchedule`.

    Args:
        dataset: the images.
        batch_size: images per batch.
        seed: names the stream.
        random_crop: cut out any square that the shorter side allows; otherwise the middle one.
        random_flip: mirror half of the images left to right.
        caption_dropout: chance that caption and label are replaced by the empty ones.
        start_batch: number of the first batch to yield.
        num_workers: processes that decode ahead; 0 decodes in this one. A small set without random crops is instead
            decoded once and kept in memory.
        kept: what other streams of the same images have decoded, if they fit in memory.
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
        kept: CropsInMemory | None = None,
    ) -> None:
        if batch_size < 1 or start_batch < 0 or num_workers < 0:
            raise ValueError(f"{batch_size=} must be at least 1, {start_batch=} and {num_workers=} at least 0")
        self.start_batch, self.num_workers = start_batch, num_workers
        self._in_memory = fits_in_memory(dataset, random_crop=random_crop)
        cropper: Cropper = (
            (kept or CropsInMemory(dataset)) if self._in_memory else Crops(dataset, random_crop=random_crop)
        )
        schedule = BatchSchedule(len(dataset), batch_size, seed, random_flip, caption_dropout, current_share())
        if dataset.stream is not None:
            schedule = replace(schedule, windows=dataset.stream.windows)
        self._stream = _Stream(dataset, cropper, schedule)

    def __iter__(self) -> Iterator[TrainingBatch]:
        numbers = itertools.count(self.start_batch)
        in_process = self._in_memory or not self.num_workers
        with closing(self._decode(numbers) if in_process else self._load(numbers)) as batches:
            for batch in batches:
                if isinstance(batch, DemeError):
                    raise batch
                # Here and not in a worker process, which would have four times as many bytes to hand over.
                yield replace(batch, clean_images=normalize(batch.clean_images))

    def _decode(self, numbers: Iterator[int]) -> Generator[TrainingBatch | DemeError, None, None]:
        yield from map(self._stream.__getitem__, numbers)

    def _load(self, numbers: Iterator[int]) -> Generator[TrainingBatch | DemeError, None, None]:
        # Without a generator of its own a DataLoader draws from the global one.
        batches: Any = iter(
            DataLoader(
                self._stream,
                batch_size=None,
                sampler=numbers,
                num_workers=self.num_workers,
                # Whatever the default is: other start methods pickle the data set, and a store cannot be.
                multiprocessing_context="fork",
                generator=generator("data workers"),
                worker_init_fn=_leave_with_parent,
            )
        )
        try:
            yield from batches
        finally:
            # Not when the garbage collector comes by, which may take ten seconds. A process that fails while it is
            # being dismissed has nothing left to do: whatever went wrong before was raised above.
            with suppress(RuntimeError):
                batches._shutdown_workers()


def _leave_with_parent(_: int) -> None:
    """Ends this process with the one that it decodes for, which may be killed: a DataLoader looks between batches."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


class _Stream(Dataset[TrainingBatch | DemeError]):
    """Batch by number, its images still uint8. A DataLoader would rewrite an error that is raised: it is returned."""

    def __init__(self, dataset: ImageDataset, cropper: Cropper, schedule: BatchSchedule) -> None:
        self._dataset, self._cropper, self._schedule = dataset, cropper, schedule
        self._shards = dataset.stream
        self._labels = None if dataset.labels is None else torch.tensor(dataset.labels)

    def __getitem__(self, number: int) -> TrainingBatch | DemeError:
        draws, side = self._schedule[number], self._dataset.resolution
        try:
            if self._shards is not None:
                self._shards.hold(draws.indices)
            squares = self._cropper.gather(draws.indices, draws.crops)
        except DemeError as error:
            return error
        images, mirrored = squares.pixels, draws.mirrored
        return TrainingBatch(
            torch.where(mirrored[:, None, None, None], images.flip(-1), images) if mirrored.any() else images,
            batch_captions(self._dataset.captions, draws),
            batch_labels(self._labels, draws),
            CropSizes(
                squares.original_sizes,
                mirrored_corners(squares.corners, squares.resized_widths, mirrored, side),
                torch.full((len(images), 2), side),
            ),
        )


def batch_captions(captions: Sequence[str] | None, draws: BatchDraws) -> tuple[str, ...] | None:
    """Returns the captions of one batch, empty where they are dropped; None where there are none."""
    if captions is None:
        return None
    pairs = zip(draws.indices.tolist(), draws.dropped.tolist(), strict=True)
    return tuple("" if dropped else captions[index] for index, dropped in pairs)


def batch_labels(labels: torch.Tensor | None, draws: BatchDraws) -> torch.Tensor | None:
    """Returns the labels of one batch, int64 (B,), -1 where they are dropped; None where there are none."""
    return None if labels is None else labels[draws.indices].masked_fill(draws.dropped, NO_LABEL)
