"""Several runs in one table: only what was evaluated alike."""

from collections.abc import Sequence
from typing import Any

from deme_core.errors import InputError
from deme_core.metrics import higher_is_better
from deme_core.settings import Settings
from deme_core.verdict import RowScores, compare, differing_conditions
from tasks.tracking import check_tracking, find_report


def compare_reports(runs: Sequence[str]) -> dict[str, dict[str, str]]:
    """Compares the merged models of runs of the whole method, and models that were evaluated alone.

    Args:
        runs: ids of MLflow runs, or their beginnings; the first is the baseline.

    Returns:
        For each run: what was scored, each metric with its interval, and the verdict against the baseline.

    Raises:
        InputError: there are fewer than two runs, one is unknown, or one was evaluated under other conditions; names
            those that differ.
    """
    if len(set(runs)) < 2:
        raise InputError("A comparison needs two runs.")
    settings = Settings()
    check_tracking(settings)
    reports = {run: find_report(settings, run=run) for run in runs}
    baseline = reports[runs[0]]
    for run, report in reports.items():
        if different := differing_conditions(baseline["conditions"], report["conditions"]):
            raise InputError(f"Runs {runs[0]} and {run} cannot be compared: they differ in {', '.join(different)}.")
    return {run: _row(report, baseline) for run, report in reports.items()}


def _row(report: dict[str, Any], baseline: dict[str, Any]) -> dict[str, str]:
    name = _scored(report)
    scores = {
        metric: f"{bounds['mean']:.4g} ({bounds['low']:.4g} to {bounds['high']:.4g})"
        for metric, bounds in report["rows"][name].items()
    }
    metric = baseline["metric"]
    ours, theirs = (_deciding(each, metric) for each in (report, baseline))
    higher = higher_is_better(metric)
    verdict = "baseline" if report is baseline else compare(ours, theirs, higher_is_better=higher)
    return {"recipe": report["recipe"], "model": report.get("model", name), **scores, "verdict": verdict}


def _deciding(report: dict[str, Any], metric: str) -> RowScores:
    name = _scored(report)
    return RowScores(report["scores"][name][metric], report.get("replicates", {}).get(name, ()))


def _scored(report: dict[str, Any]) -> str:
    """Returns the row that speaks for a run: a run of the whole method has four."""
    return "merged" if "merged" in report["rows"] else "model"
