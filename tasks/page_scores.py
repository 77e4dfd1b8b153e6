"""Scores as a page shows them, from what reports hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from deme_core.html_report.content import Difference, Score
from deme_core.metrics import higher_is_better
from deme_core.verdict import Interval, RowScores, compare, differences, interval, row_intervals


def page_row(scores: Mapping[str, Sequence[float]], primary: str, deciding: RowScores) -> dict[str, Score]:
    """Returns the scores of one row.

    Args:
        scores: one per sampling seed, by metric.
        primary: the metric that decides.
        deciding: what the row scored by that, with its resamples.
    """
    images = {primary: row_intervals(deciding).get("images")}
    return {
        metric: Score(seeds=interval(values), images=images.get(metric), by_seed=tuple(values))
        for metric, values in scores.items()
    }


def deciding_difference(row: str, baseline: str, metric: str, ours: RowScores, theirs: RowScores) -> Difference:
    """Returns how a row differs from a baseline by the metric that decides."""
    found = differences(ours, theirs)
    return Difference(row, baseline, metric, found["seeds"], found.get("images"), compare(ours, theirs))


def other_differences(report: Mapping[str, Any]) -> list[Difference]:
    """Returns how ``merged`` differs from each baseline by the metrics that do not decide."""
    return [
        Difference("merged", vs.removeprefix("vs_"), metric, Interval(**gain))
        for vs, by_metric in report["gain"].items()
        for metric, gain in by_metric.items()
        if metric != report["metric"]
    ]


def growing_metrics(scores: Mapping[str, Any]) -> frozenset[str]:
    """Returns those metrics that grow as images get better."""
    return frozenset(filter(higher_is_better, scores))


def evaluation_facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns how scores came about, for people."""
    conditions, seeds = report["conditions"], report["seeds"]
    eta = f", eta {conditions['eta']:g}" if conditions["eta"] else ""
    return {
        "images": f"{report['num_images']:,} for each of {len(seeds)} seeds ({', '.join(map(str, seeds))})",
        "sampler": f"{conditions['sampler']}, {conditions['num_inference_steps']} steps{eta}",
        "real images": f"{conditions['reference']['num_images']:,}",
        "evaluation": report["fingerprint"][:12],
    }
