import numpy as np
import pytest
import torch
from PIL import Image

from deme_core.extractors.base import resize_and_normalize
from deme_core.extractors.pillow_bicubic import resize


def resized_by_pillow(pixels: torch.Tensor, side: int) -> torch.Tensor:
    channels = [Image.fromarray(channel.numpy()) for channel in pixels.flatten(0, 1)]
    resized = [np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).unflatten(0, pixels.shape[:2])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (299, 299), (64, 100), (300, 512), (1024, 700)])
def test_pixels_are_pillows(height: int, width: int) -> None:
    drawn = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(height))
    expected = resized_by_pillow(drawn.float(), 299)
    made = resize(drawn.float(), 299)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, expected, rtol=3e-7, atol=3e-5)
    assert (made == expected).double().mean() > 0.999


def test_a_flat_image_stays_flat() -> None:
    assert torch.equal(resize(torch.full((1, 1, 10, 10), 7.0), 30), torch.full((1, 1, 30, 30), 7.0))


@pytest.mark.parametrize("side", [5, 30])
def test_what_networks_of_timm_see_is_resized_as_pillow_resizes_floats_and_clipped(side: int) -> None:
    drawn = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))
    made = resize_and_normalize(drawn, resolution=side, mean=torch.full((3, 1, 1), 9.0), std=torch.full((3, 1, 1), 2.0))
    expected = (resized_by_pillow(drawn.float(), side).clamp(0, 255) - 9) / 2
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-3)
