"""Processes that decode ahead of a training."""

import multiprocessing
import time
from multiprocessing.connection import Connection

import pytest

from deme_core.images import TrainingBatches
from deme_core.images.dataset import ResizedImage

NUM_DECODERS = 2


class SilentImages:
    """Images on a server that never answers.

    Args:
        asked: is told when a process begins to wait for an image.
    """

    resolution, channels, num_skipped, stream = 8, 3, 0, None
    captions = labels = None
    fingerprint = example_fingerprint = reference_fingerprint = ""

    def __init__(self, asked: Connection) -> None:
        self._asked = asked

    def __len__(self) -> int:
        return 8

    def resized(self, index: int) -> ResizedImage:
        self._asked.send(index)
        time.sleep(60)
        raise AssertionError


def train(asked: Connection) -> None:
    batches = TrainingBatches(
        SilentImages(asked),  # type: ignore[arg-type]
        batch_size=2,
        seed=0,
        random_crop=True,
        random_flip=False,
        num_workers=NUM_DECODERS,
    )
    next(iter(batches))


def test_decoders_that_wait_leave_with_a_worker_that_is_killed() -> None:
    context = multiprocessing.get_context("spawn")  # Without threads of other tests, which could hold locks for ever.
    told, asked = context.Pipe(duplex=False)
    worker = context.Process(target=train, args=(asked,))
    worker.start()
    asked.close()
    for _ in range(NUM_DECODERS):
        assert told.poll(60)
        told.recv()
    worker.kill()
    worker.join()
    assert told.poll(10), "somebody still holds the other end of the pipe"
    with pytest.raises(EOFError):
        told.recv()
