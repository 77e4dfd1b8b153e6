"""What a person sees in the Prefect UI: progress bars, the table of the rows, the pictures, the verdict."""

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import copy_context
from typing import Any

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from deme_core.metrics import direction
from deme_core.rows import BASELINES
from deme_core.verdict import Interval, differences_in_words, score_in_words
from tasks.tracking import Tracker

_SECONDS_BETWEEN_UPDATES = 3.0
_SECONDS_TO_END = 10.0
_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[float], None]]:
    """Makes a progress bar of the current task run; gives what moves it to a fraction in [0, 1].

    It has a thread of its own: while the server is away, or silent, the bar stands still, and the work goes on.
    """
    bar = _Bar(name)
    # Prefect finds the task run in the context.
    thread = threading.Thread(target=copy_context().run, args=(bar.follow,), name=f"bar of {name}", daemon=True)
    thread.start()
    try:
        yield bar.move
    finally:
        bar.end()
        thread.join(_SECONDS_TO_END)


class _Bar:
    """What a bar should show, and the loop that shows it."""

    def __init__(self, name: str) -> None:
        self._name, self._fraction, self._ended = name, 0.0, threading.Event()

    def move(self, fraction: float) -> None:
        self._fraction = fraction

    def end(self) -> None:
        self._ended.set()

    def follow(self) -> None:
        artifact: Any = None
        shown, is_last = 0.0, False
        while not is_last:
            try:
                if artifact is None:
                    artifact = create_progress_artifact(0.0, key=_key(self._name), description=self._name)
                is_last = self._ended.wait(_SECONDS_BETWEEN_UPDATES)
                if (fraction := self._fraction) != shown:
                    update_progress_artifact(artifact, progress=100.0 * fraction)
                    shown = fraction
            except httpx.HTTPError as error:
                _logger.warning("The progress bar of %s could not be moved (%s).", self._name, type(error).__name__)
                is_last = is_last or self._ended.wait(_SECONDS_BETWEEN_UPDATES)


def show_report(report: Mapping[str, Any], tracker: Tracker) -> None:
    """Shows the rows as a table, the sample grid as an image, and the verdict with links."""
    show_scores(report)
    if samples := tracker.file_url("samples.png"):
        create_image_artifact(
            samples, key=_key(f"{report['recipe']} samples"), description="Same initial noise per row."
        )
    create_markdown_artifact(_verdict_text(report, tracker), key=_key(f"{report['recipe']} verdict"))


def show_scores(report: Mapping[str, Any]) -> None:
    """Shows the rows as a table."""
    table = [
        {"row": row, **{metric: score_in_words(bounds) for metric, bounds in scores.items()}}
        for row, scores in report["rows"].items()
    ]
    counts = f"{report['num_images']} images for each of {len(report['seeds'])} seeds"
    metrics = list(next(iter(report["rows"].values())))
    description = f"{counts}; mean and 95 % interval over sampling seeds, {direction(metrics)}."
    create_table_artifact(table, key=_key(f"{report['recipe']} rows"), description=description)


def _verdict_text(report: Mapping[str, Any], tracker: Tracker) -> str:
    lines = [f"# {report['recipe']}", ""]
    for baseline in BASELINES:
        gains = {over: Interval(**gain) for over, gain in report["gain_by"][f"vs_{baseline}"].items()}
        numbers = differences_in_words(report["metric"], gains)
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
