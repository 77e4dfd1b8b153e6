"""TF32, which a GPU takes for float32 convolutions by torch's default: 10 bits of mantissa in place of 23."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_tf32() -> Iterator[None]:
    """Keeps float32 convolutions float32, always the same ones: a GPU's results are then a CPU's but for rounding."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
