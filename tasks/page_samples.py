"""Samples as a page shows them: a grid of each row, or, where there are prompts, the images of each above it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deme_core.errors import InputError
from deme_core.figures import cut_tiles
from deme_core.html_report.content import Samples
from deme_core.html_report.pictures import read_picture, tile_picture
from deme_core.prompts import Prompts, load_prompts
from tasks.runtime import Runtime

_NUM_PROMPTS_SHOWN = 10
# Images of one prompt, where there are fewer prompts than images: as many as fit.
_MOST_IMAGES_OF_A_PROMPT, _WIDEST_STRIP, _GAP = 6, 1024, 2


def image_prompts(runtime: Runtime, conditions: Mapping[str, Any]) -> Prompts | None:
    """Returns the prompts that the images were made from; None if there are none, or not on this machine."""
    path = runtime.recipe.evaluate.prompts
    if path is None:
        return None
    try:
        prompts = load_prompts(path, runtime.settings.cache_folder)
    except InputError:  # With execution.runner: prefect the path is one of the workers'.
        return None
    return prompts if prompts.digest == conditions.get("prompts") else None


def page_samples(
    grids: Mapping[str, Path], seed: int, conditions: Mapping[str, Any], prompts: Prompts | None
) -> Samples:
    """Returns the first images of every row.

    Args:
        grids: sample grids by row.
        seed: their sampling seed.
        conditions: under which they were generated.
        prompts: what they were made from.
    """
    note = f"The first images of seed {seed}. All rows start from the same noise, so tiles compare one by one."
    if prompts is None:
        return Samples(note=note, rows={row: (read_picture(path),) for row, path in grids.items()})
    tiles = {row: _images(path, conditions) for row, path in grids.items()}
    return Samples(
        note=note,
        rows={
            row: tuple(
                tile_picture(_strip(images[first :: len(prompts.texts)]), text)
                for first, text in enumerate(prompts.texts[: min(_NUM_PROMPTS_SHOWN, len(images))])
            )
            for row, images in tiles.items()
        },
    )


def _images(path: Path, conditions: Mapping[str, Any]) -> list[Any]:
    """Returns the images of a grid, as PIL's.

    A grid holds the first slice of a set, 64 images at most. Where it was found in the store, the slices may have been
    those of another recipe, so only the grid tells how many it holds: what follows them in the last line is white.
    """
    images = cut_tiles(path, side=conditions["shape"][-1], count=conditions["num_images"])
    for _ in range(math.ceil(math.sqrt(len(images))) - 1):  # The last line is not empty, whatever is in it.
        if any(darkest < 255 for darkest, _ in images[-1].getextrema()):
            break
        images.pop()
    return images


def _strip(images: Sequence[Any]) -> Any:
    """Returns the first images of one prompt side by side, as one PIL image."""
    from PIL import Image

    width, height = images[0].size
    shown = images[: max(1, min(_MOST_IMAGES_OF_A_PROMPT, _WIDEST_STRIP // (width + _GAP)))]
    strip = Image.new("RGB", (len(shown) * (width + _GAP) - _GAP, height), "white")
    for index, image in enumerate(shown):
        strip.paste(image, (index * (width + _GAP), 0))
    return strip
