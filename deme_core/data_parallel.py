"""Data-parallel training: several processes of one machine, each with its share of every batch.

The batch, its noise and its timesteps are those of one process with the whole batch: every process draws all of it and
takes its own part. torch's DistributedDataParallel, through accelerate, averages the gradients.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")

# A process waits so long for the others, of which one may be storing a checkpoint; the death of one is noticed at once.
_PATIENCE = timedelta(hours=2)


# What processes tell each other, beside gradients: over NCCL every word would wait for all that the GPU has begun.
_words: list[Any] = []


@dataclass(frozen=True)
class Share:
    """The part of each batch that one process trains on.

    Attributes:
        rank: number of the process, from 0.
        num_processes: how many there are.
    """

    rank: int = 0
    num_processes: int = 1

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns this process's rows of a tensor whose first dimension is the whole batch."""
        size = len(rows) // self.num_processes
        return rows[self.rank * size : (self.rank + 1) * size]


def current_share() -> Share:
    """Returns the share of this process: all, unless it has joined others."""
    if not distributed.is_initialized():
        return Share()
    return Share(distributed.get_rank(), distributed.get_world_size())


def agree(value: T) -> T:
    """Returns the value that rank 0 has."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=_words[0])
    return values[0]


@contextlib.contextmanager
def join(share: Share, meeting_point: Path, device: str) -> Iterator[None]:
    """Makes this process one of several that train together.

    Args:
        share: which one.
        meeting_point: a file that all of them can write; it must not exist yet. No port is opened for them to meet.
        device: cpu (gloo) or cuda (NCCL for gradients, GPU number ``rank`` of those that the process sees).

    All leave together: over NCCL the first to leave waits for the others. So where the context ends by an exception
    over NCCL, the process stays joined, and is of no more use.
    """
    rank, count = str(share.rank), str(share.num_processes)
    # What accelerate reads; and data go between processes of one machine, so no other interface shall listen.
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    os.environ.update(variables)
    if device == "cuda":
        torch.cuda.set_device(share.rank)
    is_whole = device != "cuda"
    try:
        distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=meeting_point.resolve().as_uri(),
            rank=share.rank,
            world_size=share.num_processes,
            timeout=_PATIENCE,
        )
        _words.append(distributed.new_group(backend="gloo", timeout=_PATIENCE))
        yield
        is_whole = True
    finally:
        _words.clear()
        if distributed.is_initialized() and is_whole:
            distributed.destroy_process_group()
        for name in variables:
            os.environ.pop(name, None)
