"""Several runs side by side: only what was evaluated alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from deme_core.errors import InputError
from deme_core.metrics import higher_is_better
from deme_core.settings import Settings
from deme_core.verdict import RowScores, compare, differing_conditions, lacks_images, score_in_words
from tasks.tracked_runs import check_tracking, find_report

Reports = Mapping[str, Mapping[str, Any]]


def comparable_reports(runs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the reports of runs of the whole method, and of models that were evaluated alone.

    Args:
        runs: ids of MLflow runs, or their beginnings; the first is the baseline.

    Returns:
        The reports, by what was given, of the metrics that all have, the one that decides first.

    Raises:
        InputError: there are fewer than two runs, one is unknown or named twice, or one was evaluated under other
            conditions; names those that differ, with their values.
    """
    if len(set(runs)) < 2:
        raise InputError("A comparison needs two runs.")
    settings = Settings()
    check_tracking(settings)
    reports = {run: find_report(settings, run=run) for run in runs}
    if len({report["mlflow_run_id"] for report in reports.values()}) < len(reports):
        raise InputError(f"Some of {', '.join(reports)} are the same run; name each once.")
    baseline = reports[runs[0]]
    for run, report in reports.items():
        if different := differing_conditions(baseline["conditions"], report["conditions"]):
            raise InputError(f"Runs {runs[0]} and {run} cannot be compared: they differ in {', '.join(different)}.")
    shared = set[str].intersection(*(set(report["rows"][scored_row(report)]) for report in reports.values()))
    # JSON that came through MLflow is sorted by name; what decides comes first.
    metrics = sorted(shared, key=lambda metric: (metric != baseline["metric"], metric))
    return {run: _of_metrics(report, metrics) for run, report in reports.items()}


def _of_metrics(report: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """Returns a report of those metrics alone, in that order."""

    def kept(by_row: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return {row: {m: values[m] for m in metrics if m in values} for row, values in by_row.items()}

    return {**report, "rows": kept(report["rows"]), "scores": kept(report["scores"])}


def comparison_table(reports: Reports) -> dict[str, dict[str, str]]:
    """Returns for each run what was scored, each metric with its interval, and the verdict against the first run."""
    baseline = next(iter(reports.values()))
    return {run: _row(report, baseline) for run, report in reports.items()}


def _row(report: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, str]:
    name = scored_row(report)
    scores = {metric: score_in_words(bounds) for metric, bounds in report["rows"][name].items()}
    metric = baseline["metric"]
    ours, theirs = (deciding_scores_of(each, metric) for each in (report, baseline))
    higher = higher_is_better(metric)
    verdict: str = "baseline" if report is baseline else compare(ours, theirs, higher_is_better=higher)
    if lacks_images(ours, theirs):
        verdict += " (only one of the two has resamples)"
    return {"recipe": report["recipe"], "model": report.get("model", name), **scores, "verdict": verdict}


def deciding_scores_of(report: Mapping[str, Any], metric: str) -> RowScores:
    """Returns what the row that speaks for a run scored by the metric that decides."""
    name = scored_row(report)
    return RowScores(report["scores"][name][metric], report.get("replicates", {}).get(name, ()))


def scored_row(report: Mapping[str, Any]) -> str:
    """Returns the row that speaks for a run: a run of the whole method has four, or five."""
    return "merged" if "merged" in report["rows"] else "model"
