"""What a person sees in the Prefect UI: progress bars, the table of the rows, the pictures, the verdict."""

import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from deme_core.metrics import direction
from tasks.tracking import Tracker

_SECONDS_BETWEEN_UPDATES = 3.0
_logger = logging.getLogger(__name__)


def progress_artifact(name: str) -> Callable[[float], None]:
    """Makes a progress bar of the current task run; returns what moves it to a fraction in [0, 1].

    While the server does not answer the bar stands still: the work must not stop for it.
    """
    artifact = create_progress_artifact(0.0, key=_key(name), description=name)
    assert isinstance(artifact, UUID)
    told = time.monotonic()

    def move(fraction: float) -> None:
        nonlocal told
        if fraction >= 1.0 or time.monotonic() - told >= _SECONDS_BETWEEN_UPDATES:
            told = time.monotonic()
            try:
                update_progress_artifact(artifact, progress=100.0 * fraction)
            except httpx.HTTPError as error:
                _logger.warning("The progress bar of %s could not be moved (%s).", name, type(error).__name__)

    return move


def show_report(report: Mapping[str, Any], tracker: Tracker) -> None:
    """Shows the rows as a table, the sample grid as an image, and the verdict with links."""
    show_scores(report, tracker)
    if samples := tracker.file_url("samples.png"):
        create_image_artifact(
            samples, key=_key(f"{report['recipe']} samples"), description="Same initial noise per row."
        )
    create_markdown_artifact(_verdict_text(report, tracker), key=_key(f"{report['recipe']} verdict"))


def show_scores(report: Mapping[str, Any], tracker: Tracker) -> None:
    """Shows the rows as a table."""
    table = [
        {"row": row, **{metric: f"{s['mean']:.4g} ({s['low']:.4g} to {s['high']:.4g})" for metric, s in scores.items()}}
        for row, scores in report["rows"].items()
    ]
    counts = f"{report['num_images']} images for each of {len(report['seeds'])} seeds"
    metrics = list(next(iter(report["rows"].values())))
    description = f"{counts}; mean and 95 % interval over sampling seeds, {direction(metrics)}."
    create_table_artifact(table, key=_key(f"{report['recipe']} rows"), description=description)


def _verdict_text(report: Mapping[str, Any], tracker: Tracker) -> str:
    lines = [f"# {report['recipe']}", ""]
    for baseline in ("pretrained", "finetuned"):
        metric, gain = next(iter(report["gain"][f"vs_{baseline}"].items()))
        numbers = f"{metric} {gain['mean']:+.3g}, 95 % interval {gain['low']:+.3g} to {gain['high']:+.3g}"
        lines.append(f"- `merged` against `{baseline}`: **{report['verdict'][f'vs_{baseline}']}** ({numbers})")
    registry = report["registry"]
    where = f"`{registry['model']}` version {registry['version']}" if registry["version"] else f"`{registry['model']}`"
    lines += [
        f"- merge weights {report['merged']['weights']}, scale of the control {report['finetuned']['scale']:g}",
        f"- {where}: {registry['decision']}, since {registry['reason']}",
        f"- merged model `{report['merged']['uri']}`",
    ]
    if url := tracker.run_url():
        lines += [f"- [the whole report]({url}/artifacts/report.html)", f"- [this run in MLflow]({url})"]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    """Returns an artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
