"""Scores as a page shows them, from what reports hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from deme_core.html_report.content import Difference, Score, Scores
from deme_core.metrics import higher_is_better
from deme_core.verdict import RowScores, compare, differences, interval, paired_difference, row_intervals

ByMetric = Mapping[str, Sequence[float]]


def page_scores(
    scores: Mapping[str, ByMetric],
    deciding: Mapping[str, RowScores],
    metric: str,
    pairs: Sequence[tuple[str, str]],
    *,
    draws_real_images: bool = True,
) -> Scores:
    """Returns what a page says of scores.

    Args:
        scores: by row and metric, one per sampling seed.
        deciding: what each row scored by the metric that decides, with its resamples.
        metric: the metric that decides.
        pairs: a row and its baseline, of every difference to state.
        draws_real_images: whether resamples draw the real images, too.
    """
    decide = [_deciding_difference(row, baseline, metric, deciding) for row, baseline in pairs]
    others = [
        Difference(row, baseline, other, paired_difference(values, scores[baseline][other]))
        for row, baseline in pairs
        for other, values in scores[row].items()
        if other != metric
    ]
    return Scores(
        metric=metric,
        rows={row: _row(by_metric, metric, deciding[row]) for row, by_metric in scores.items()},
        differences=(*decide, *others),
        higher_is_better=frozenset(m for by_metric in scores.values() for m in by_metric if higher_is_better(m)),
        draws_real_images=draws_real_images,
    )


def _row(scores: ByMetric, metric: str, deciding: RowScores) -> dict[str, Score]:
    images = {metric: row_intervals(deciding).get("images")}
    return {name: Score(interval(values), images.get(name), tuple(values)) for name, values in scores.items()}


def _deciding_difference(row: str, baseline: str, metric: str, deciding: Mapping[str, RowScores]) -> Difference:
    ours, theirs = deciding[row], deciding[baseline]
    found = differences(ours, theirs)
    verdict = compare(ours, theirs, higher_is_better=higher_is_better(metric))
    return Difference(row, baseline, metric, found["seeds"], found.get("images"), verdict)


def evaluation_facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns how scores came about, for people."""
    conditions, seeds = report["conditions"], report["seeds"]
    eta = f", eta {conditions['eta']:g}" if conditions["eta"] else ""
    guidance = {"guidance": f"{conditions['guidance_scale']:g}"} if "guidance_scale" in conditions else {}
    return {
        "images": f"{report['num_images']:,} for each of {len(seeds)} seeds ({', '.join(map(str, seeds))})",
        "sampler": f"{conditions['sampler']}, {conditions['num_inference_steps']} steps{eta}",
        **guidance,
        "real images": f"{conditions['reference']['num_images']:,}",
        "evaluation": report["fingerprint"][:12],
    }
