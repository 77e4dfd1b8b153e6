"""The pictures of a report, as PNG files in a folder and in MLflow."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deme_core.binned_losses import RelativeLosses
from deme_core.figures import save_heldout_losses, save_loss_curves, save_sample_comparison
from tasks.row_scores import Rows
from tasks.run_page import samples_file
from tasks.runtime import Runtime


def report_folder(runtime: Runtime) -> Path:
    """Returns where the files of this run's report are kept: DEME_HOME/reports/<MLflow run>."""
    folder = runtime.settings.state_folder / "reports" / runtime.tracker.run_id
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sample_grids(runtime: Runtime, rows: Rows) -> dict[str, Path]:
    """Copies the grid of each row, of the first seed, into the report's folder and MLflow; returns their paths."""
    grids = {row: report_folder(runtime) / samples_file(row) for row in rows}
    for row, path in grids.items():
        shutil.copyfile(runtime.fetch(rows[row][0].ref) / "samples.png", path)
        runtime.tracker.log_file(runtime.tracker.run_id, path)
    return grids


def draw_figures(
    runtime: Runtime,
    grids: Mapping[str, Path],
    seed: int,
    histories: Mapping[str, Any],
    relative: Mapping[str, RelativeLosses],
) -> dict[str, str]:
    """Draws the figures into the report's folder and MLflow; returns their paths.

    Args:
        runtime: where to.
        grids: sample grids by row.
        seed: the sampling seed of the grids.
        histories: records of each training, by its name.
        relative: held-out losses by row and copy.
    """
    folder = report_folder(runtime)
    figures = {name: folder / f"{name}.png" for name in ("samples", "losses", "heldout_loss")}
    save_heldout_losses(relative, figures["heldout_loss"])
    save_sample_comparison(grids, figures["samples"], title=f"{runtime.recipe.name}, same initial noise (seed {seed})")
    save_loss_curves(histories, figures["losses"])
    for path in figures.values():
        runtime.tracker.log_file(runtime.tracker.run_id, path)
    runtime.tracker.log_image(runtime.tracker.run_id, figures["samples"], "samples")
    return {name: str(path) for name, path in figures.items()}
