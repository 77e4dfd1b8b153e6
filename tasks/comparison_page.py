"""The page of several runs: what it shows, and where it is written."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deme_core.binned_losses import RelativeLosses
from deme_core.digests import sha256_bytes
from deme_core.html_report import comparison_page
from deme_core.html_report.content import ComparedRun, ComparisonContent, HeldoutLosses, Picture, Samples
from deme_core.html_report.pictures import read_picture
from deme_core.local_files import local_errors, temporary_beside
from deme_core.recipe_file import differing_settings
from deme_core.settings import Settings
from deme_core.verdict import Interval
from tasks.comparison import Reports, deciding_scores_of, scored_row
from tasks.page_scores import evaluation_facts, page_scores
from tasks.run_page import samples_file
from tasks.tracked_runs import download


def write_comparison(reports: Reports, out: Path | None) -> Path:
    """Writes the page of several runs and returns its path.

    Args:
        reports: of the runs; the first is the baseline.
        out: the file to write; by default one under DEME_HOME/reports, named after the runs.
    """
    settings = Settings()
    path = out or settings.state_folder / "reports" / f"comparison-{_name(reports)}.html"
    page = comparison_page(_content(settings, list(reports.values())))
    with local_errors(path), temporary_beside(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    return path


def _name(reports: Reports) -> str:
    return sha256_bytes(" ".join(report["mlflow_run_id"] for report in reports.values()).encode())[:12]


def _content(settings: Settings, reports: list[Mapping[str, Any]]) -> ComparisonContent:
    by_label = {f"{report['recipe']} {report['mlflow_run_id'][:8]}": report for report in reports}
    baseline, *others = by_label
    metric = reports[0]["metric"]
    curves = {label: _curve(report) for label, report in by_label.items()}
    with tempfile.TemporaryDirectory() as folder:
        fetched = {label: _Fetched(settings, report, Path(folder)) for label, report in by_label.items()}
        return ComparisonContent(
            runs=_compared(by_label, {label: each.recipe() for label, each in fetched.items()}),
            facts=evaluation_facts(reports[0]),
            scores=page_scores(
                {label: report["scores"][scored_row(report)] for label, report in by_label.items()},
                {label: deciding_scores_of(report, metric) for label, report in by_label.items()},
                metric,
                [(label, baseline) for label in others],
                draws_real_images=all(report.get("draws_real_images") for report in reports),
            ),
            samples=Samples(
                note=f"The first images of seed {reports[0]['seeds'][0]}, from the same noise in every run.",
                rows={label: (grid,) for label, each in fetched.items() if (grid := each.grid())},
            ),
            heldout=HeldoutLosses(curves=found) if (found := {k: v for k, v in curves.items() if v}) else None,
        )


class _Fetched:
    """The files of one run that a comparison shows."""

    def __init__(self, settings: Settings, report: Mapping[str, Any], folder: Path) -> None:
        self._settings, self._report = settings, report
        self._folder = folder / report["mlflow_run_id"]
        self._folder.mkdir()

    def grid(self) -> Picture | None:
        """Returns the samples of the row that speaks for the run; None for runs made before they were kept."""
        path = self._download(samples_file(scored_row(self._report)))
        return read_picture(path) if path else None

    def recipe(self) -> dict[str, Any]:
        """Returns the resolved recipe."""
        path = self._download("recipe.yaml")
        return yaml.safe_load(path.read_text()) if path else {}

    def _download(self, name: str) -> Path | None:
        return download(self._settings, self._report["mlflow_run_id"], name, self._folder)


def _compared(by_label: Reports, recipes: Mapping[str, Mapping[str, Any]]) -> tuple[ComparedRun, ...]:
    different = differing_settings(list(recipes.values()))
    return tuple(
        ComparedRun(
            label=label,
            run=report["mlflow_run_id"],
            recipe=report["recipe"],
            model=report.get("model", scored_row(report)),
            settings={name: "–" if values[index] is None else str(values[index]) for name, values in different.items()},
        )
        for index, (label, report) in enumerate(by_label.items())
    )


def _curve(report: Mapping[str, Any]) -> RelativeLosses | None:
    """Returns the held-out losses of the row that speaks for a run; None if they were not measured."""
    found = report.get("heldout_change", {}).get(scored_row(report))
    if found is None:
        return None
    return RelativeLosses(tuple(found["edges"]), tuple(Interval(**change) for change in found["changes"]))
