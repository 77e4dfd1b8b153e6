"""Pictures as text that a page can hold."""

import base64
import io
from pathlib import Path
from typing import Any

from deme_core.html_report.content import Picture

_WIDEST = 1024  # Pixels: four grids beside one another are never shown larger, even on a large screen.
_SMALL_TILE = 128


def read_picture(path: Path, caption: str | None = None) -> Picture:
    """Returns a picture file for a page: bit for bit where it is small, as a smaller WebP where it is not.

    Args:
        path: a PNG, such as a grid of samples.
        caption: text under it.
    """
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        if image.width <= _WIDEST:
            return Picture(_data_uri(path.read_bytes(), "image/png"), image.width, caption)
        buffer = io.BytesIO()
        small = image.convert("RGB").resize((_WIDEST, round(image.height * _WIDEST / image.width)))
        small.save(buffer, "WEBP", quality=90)
    return Picture(_data_uri(buffer.getvalue(), "image/webp"), _WIDEST, caption)


def tile_picture(image: Any, caption: str) -> Picture:
    """Returns a generated image, or several in a row, for a page, as a WebP that is lossless where they are small.

    Args:
        image: PIL's.
        caption: text under it, such as its prompt.
    """
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=90, lossless=image.height <= _SMALL_TILE)
    return Picture(_data_uri(buffer.getvalue(), "image/webp"), image.width, caption)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
