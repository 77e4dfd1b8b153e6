"""From encoded bytes to pixels, bit for bit as diffusers' unconditional training example does it."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

# Raised when the code below starts to give other pixels; part of every fingerprint.
PIXELS_VERSION = 1

PIL_MODES = {1: "L", 3: "RGB"}
# Whatever a file is called, Pillow would try all that it knows: for EPS it runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
# A line of a million pixels is two kilobytes of PNG, and 786 GB once its shorter side is 512.
_MAX_ASPECT_RATIO = 100


class BrokenImageError(Exception):
    """One image cannot be decoded; the message is the reason alone."""


def decode(encoded: bytes, *, channels: int) -> Image.Image:
    """Decode one image, upright, as grey (``channels`` 1) or RGB (3) with 8 bits.

    Raises:
        BrokenImageError: the bytes are damaged, no image of ``FORMATS``, or of a kind without a range of values, or
            one side is more than 100 times as long as the other.
    """
    try:
        image: Image.Image = Image.open(BytesIO(encoded), formats=FORMATS)
        if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
            raise BrokenImageError(f"{image.width}×{image.height} pixels are longer than {_MAX_ASPECT_RATIO} to 1")
        image.load()
        if image.getexif().get(Base.Orientation) is not None:
            image = ImageOps.exif_transpose(image)
        return _to_eight_bits(image).convert(PIL_MODES[channels])
    except (BrokenImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BrokenImageError("not an image" if encoded else "empty file") from error
    except Exception as error:  # Pillow's decoders answer damage with nearly any exception.
        raise BrokenImageError(str(error) or type(error).__name__) from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey: Pillow's own conversion would clip it at 255."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BrokenImageError(f"mode {image.mode} has no defined range")
    return image


def resize(image: Image.Image, resolution: int) -> torch.Tensor:
    """Scale the shorter side to ``resolution``, bilinear with antialiasing.

    Returns:
        uint8 (C, H, W), min(H, W) = resolution.
    """
    width, height = image.size
    longer = int(resolution * max(width, height) / min(width, height))
    size = (resolution, longer) if width <= height else (longer, resolution)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def center_corner(pixels: torch.Tensor, resolution: int) -> tuple[int, int]:
    """Top and left of the middle square of (C, H, W)."""
    top, left = (round((side - resolution) / 2.0) for side in pixels.shape[-2:])
    return top, left


def random_corner(pixels: torch.Tensor, draws: Sequence[float], resolution: int) -> tuple[int, int]:
    """Top and left of any square within (C, H, W), for two draws in [0, 1)."""
    top, left = (int(draw * (side - resolution + 1)) for draw, side in zip(draws, pixels.shape[-2:], strict=True))
    return top, left


def crop(pixels: torch.Tensor, corner: tuple[int, int], resolution: int) -> torch.Tensor:
    """Cut a square out of (C, H, W), from its top left corner on; returns (C, resolution, resolution)."""
    top, left = corner
    return pixels[:, top : top + resolution, left : left + resolution].contiguous()
