"""Metrics: one file for each, and a registry.

Scores are comparable only among rows with equal counts of images and one extractor; `metric_name` keeps the scales of
different extractors apart.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from deme_core.extractor_names import EXTRACTOR_NAMES, INCEPTION_NAMES
from deme_core.metrics.base import Comparison, Counts, DecidingMetric, Metric, Resamples
from deme_core.metrics.clip_score import MeanClipScore, grouped_scores
from deme_core.metrics.frechet import FrechetDistance
from deme_core.metrics.kernel import KernelDistance
from deme_core.metrics.precision_recall import Precision, Recall

__all__ = [
    "METRICS",
    "Comparison",
    "Counts",
    "DecidingMetric",
    "Metric",
    "MetricName",
    "Resamples",
    "deciding_metric",
    "direction",
    "grouped_scores",
    "higher_is_better",
    "keeps_features",
    "metric_name",
    "metric_names",
    "needs_features",
    "needs_prompts",
    "score",
]

# Of more real images the draw hardly matters to a score, and resamples of these take nine seconds each.
MOST_KEPT = 50_000

# What a recipe may name, and what each name means.
MetricName = Literal["fid", "kid", "precision", "recall", "clip_score"]
METRICS: dict[MetricName, Metric] = {
    "fid": FrechetDistance(),
    "kid": KernelDistance(),
    "precision": Precision(),
    "recall": Recall(),
    "clip_score": MeanClipScore(),
}
assert tuple(METRICS) == get_args(MetricName)


def metric_name(metric: MetricName, extractor_name: str) -> str:
    """Name a score is reported under: plain 'fid' and 'kid' belong to Inception in clean-fid's mode clean alone.

    Args:
        metric: one of METRICS.
        extractor_name: name of a feature extractor.

    Returns:
        For example ``fid``, ``fid_legacy_pytorch`` or ``fd_efficientnet_lite0``; ``clip_score`` with any extractor.

    Raises:
        ValueError: for an unknown metric or extractor.
    """
    if metric not in METRICS or extractor_name not in EXTRACTOR_NAMES:
        raise ValueError(f"There is no metric {metric!r} of extractor {extractor_name!r}.")
    prefix = METRICS[metric].prefix
    if prefix is None:
        return metric
    if (
        extractor_name in INCEPTION_NAMES
    ):  # After clean-fid's own names for its modes; the scales of all of them differ.
        return f"{metric}{extractor_name.removeprefix('inception')}"
    return f"{prefix}_{extractor_name}"


def metric_names(metrics: Sequence[MetricName], extractor_names: Sequence[str]) -> list[str]:
    """Returns the names of all scores, those of the first extractor first, each once."""
    return list(dict.fromkeys(metric_name(metric, name) for name in extractor_names for metric in metrics))


_BY_REPORTED_NAME = {metric_name(metric, name): METRICS[metric] for metric in METRICS for name in EXTRACTOR_NAMES}


def higher_is_better(name: str) -> bool:
    """Whether a metric, called as `metric_name` does (else ValueError), grows as images get better."""
    if name not in _BY_REPORTED_NAME:
        raise ValueError(f"There is no metric that is reported as {name!r}.")
    return _BY_REPORTED_NAME[name].higher_is_better


def direction(names: Sequence[str]) -> str:
    """Says of the columns of a table which way is better.

    Args:
        names: titles of the columns, as `metric_name` gives them; others are left out.

    Returns:
        For example ``lower is better, but higher of recall``.
    """
    known = [name for name in names if name in _BY_REPORTED_NAME]
    higher = [name for name in known if higher_is_better(name)]
    if higher == known and known:
        return "higher is better"
    return f"lower is better, but higher of {' and '.join(higher)}" if higher else "lower is better"


def score(comparison: Comparison, metrics: Sequence[MetricName]) -> dict[str, float]:
    """Returns scores by `metric_names`, in that order; see `higher_is_better`."""
    scores: dict[str, float] = {}
    for part in comparison.parts:
        for metric in metrics:
            name = metric_name(metric, part.reference.extractor_name)
            if name not in scores:
                scores[name] = METRICS[metric].score(part)
    return scores


def deciding_metric(name: MetricName) -> DecidingMetric | None:
    """Returns a metric that can decide a verdict; None for those that cannot, as precision alone says little."""
    metric = METRICS[name]
    return metric if isinstance(metric, DecidingMetric) else None


def needs_features(metrics: Sequence[MetricName]) -> bool:
    """Whether a score needs the features of the real images; for the Fréchet distance mean and covariance do."""
    return any(METRICS[metric].needs == "features" for metric in metrics)


def keeps_features(metrics: Sequence[MetricName], num_real_images: int) -> bool:
    """Whether the report's reference has the features of real images, which its resamples then draw, too."""
    return needs_features(metrics) or num_real_images <= MOST_KEPT


def needs_prompts(metrics: Sequence[MetricName]) -> bool:
    """Whether one of the metrics scores images against prompts."""
    return any(METRICS[metric].needs == "prompts" for metric in metrics)
