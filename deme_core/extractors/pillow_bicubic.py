"""Pillow's bicubic resizing of float images as two products of matrices: the same pixels, on a GPU.

Clean-fid resizes each channel as a float image by Pillow, which keeps a core busy for milliseconds an image; a GPU that
takes the features of many waits for that.
"""

from functools import lru_cache

import torch


def resize(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Resizes (B, C, H, W) to (B, C, side, side), float32, as ``Image.resize(BICUBIC)`` does in Pillow's mode F.

    Pillow adds in float64 and rounds to float32 after the horizontal pass and after the vertical one; so does this.
    Sums may be in another order, so that a few values differ in their last bit.
    """
    height, width = pixels.shape[-2:]
    rows, columns = (_weights(size, side).to(pixels.device) for size in (height, width))
    across = (pixels.double() @ columns.T).float()
    return (rows @ across.double()).float()


@lru_cache(maxsize=8)
def _weights(size: int, side: int) -> torch.Tensor:
    """Returns what each pixel adds to each resized one, float64 (side, size), as Pillow's Resample.c has it."""
    scale = size / side
    stretch = max(scale, 1.0)  # Shrinking widens the filter, which is the antialiasing.
    support = 2.0 * stretch
    centers = (torch.arange(side, dtype=torch.float64) + 0.5) * scale
    low = (centers - support + 0.5).trunc().clamp(min=0)
    high = (centers + support + 0.5).trunc().clamp(max=size)
    positions = torch.arange(size, dtype=torch.float64)
    weights = _cubic((positions - centers[:, None] + 0.5) / stretch)
    weights[(positions < low[:, None]) | (positions >= high[:, None])] = 0.0
    return weights / weights.sum(dim=1, keepdim=True)


def _cubic(distances: torch.Tensor) -> torch.Tensor:
    """Returns Keys' cubic kernel with a = -0.5."""
    x = distances.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
