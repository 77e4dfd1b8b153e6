"""Samples as a page shows them: a grid of each row, or, where there are prompts, image by image under its prompt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deme_core.errors import InputError
from deme_core.figures import cut_tiles
from deme_core.html_report.content import Samples
from deme_core.html_report.pictures import read_picture, tile_picture
from deme_core.prompts import Prompts, load_prompts
from tasks.runtime import Runtime

_NUM_PROMPTS_SHOWN = 8


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
    count = min(_NUM_PROMPTS_SHOWN, conditions["num_images"])
    texts, side = prompts.of_images(range(count)), conditions["shape"][-1]
    tiles = {row: cut_tiles(path, side=side, count=count) for row, path in grids.items()}
    return Samples(
        note=note,
        rows={row: tuple(map(tile_picture, images, texts)) for row, images in tiles.items()},
    )
