"""Figures: grids of generated images and loss curves, as PNG files."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from deme_core.binned_losses import RelativeLosses

_SMALLEST_TILE = 32  # Pixels; smaller images are enlarged by a whole factor so that a person can see them.
_MARGIN = 2


def import_matplotlib() -> None:
    """Imports what drawing takes, half a second's worth, before somebody waits for a figure."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.figure  # noqa: F401


def save_image_grid(images: "torch.Tensor", path: Path) -> None:
    """Writes uint8 images (B, C, H, W), C = 1 or 3, as one PNG, about as wide as high."""
    from PIL import Image

    pixels = images.permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    factor = max(1, math.ceil(_SMALLEST_TILE / height))
    columns = math.ceil(math.sqrt(len(pixels)))
    rows = math.ceil(len(pixels) / columns)
    step_x, step_y = width * factor + _MARGIN, height * factor + _MARGIN
    grid = Image.new("RGB", (columns * step_x + _MARGIN, rows * step_y + _MARGIN), "white")
    for index, image in enumerate(pixels):
        tile = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        tile = tile.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        grid.paste(tile, (_MARGIN + column * step_x, _MARGIN + row * step_y))
    grid.save(path)


def cut_tiles(path: Path, *, side: int, count: int) -> list[Any]:
    """Returns the first images of a grid that `save_image_grid` wrote, as it shows them.

    Args:
        path: the PNG.
        side: of the square images, in pixels, before they were enlarged.
        count: how many, at most.

    Returns:
        PIL images; beyond the last image of the grid they are white.
    """
    from PIL import Image

    tile = side * max(1, math.ceil(_SMALLEST_TILE / side))
    with Image.open(path, formats=["PNG"]) as grid:
        columns = (grid.width - _MARGIN) // (tile + _MARGIN)
        rows = (grid.height - _MARGIN) // (tile + _MARGIN)
        places = [divmod(index, columns) for index in range(min(count, rows * columns))]
        corners = [(_MARGIN + x * (tile + _MARGIN), _MARGIN + y * (tile + _MARGIN)) for y, x in places]
        return [grid.crop((left, top, left + tile, top + tile)) for left, top in corners]


def save_sample_comparison(grids: Mapping[str, Path], path: Path, *, title: str) -> None:
    """Writes the grids of all rows beside one another, each under its row's name.

    Args:
        grids: a PNG per row; all show the same images of the same seed, so tiles can be compared one by one.
        path: the PNG to write.
        title: what the rows share.
    """
    from matplotlib.figure import Figure

    pictures = {row: _read_png(file) for row, file in grids.items()}
    figure = Figure(figsize=(3.6 * len(pictures), 4.3), layout="constrained")
    for axes, (row, picture) in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures.items(), strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(row)
        axes.set_axis_off()
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def save_loss_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Writes diffusion and consistency loss over optimizer steps, one line per training run.

    Args:
        histories: progress records by run, e.g. ``segment 0 [0, 250)``.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    panels = ["diffusion_loss", "consistency_loss"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), panels, strict=True):
        for run, history in histories.items():
            axes.plot([r["global_step"] for r in history], [r[name] for r in history], label=run, linewidth=1.2)
        axes.set_xlabel("optimizer step")
        axes.set_title(name.replace("_", " "))
        if any(record[name] > 0 for history in histories.values() for record in history):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def save_heldout_losses(rows: Mapping[str, "RelativeLosses"], path: Path) -> None:
    """Writes the change of the held-out loss against the pretrained model, by timestep, one line per row.

    Args:
        rows: by row; bands are 95 % intervals over the images.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for row, losses in rows.items():
        middles = [(low + high) / 2 for low, high in itertools.pairwise(losses.edges)]
        (line,) = axes.plot(middles, [100 * c.mean for c in losses.changes], label=row, **_style(row))
        low, high = [100 * c.low for c in losses.changes], [100 * c.high for c in losses.changes]
        if not row.startswith("segment"):
            axes.fill_between(middles, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("timestep (0: least noise)")
    axes.set_ylabel("held-out loss against pretrained, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _style(row: str) -> dict[str, Any]:
    return {"linewidth": 1.0, "linestyle": ":"} if row.startswith("segment") else {"linewidth": 1.5}


def _read_png(file: Path) -> Any:
    from matplotlib.image import imread

    return imread(file)
