"""Verdicts: is one row's score really better than another's, or too close to call (METHOD section 5.2)?

Every row is sampled from the same initial noise per seed, so the rows' scores are paired by seed, and what
the seeds share cancels in their differences.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from deme_core.recipe_file import differing_settings

Verdict = Literal["better", "worse", "too close to call"]

_CONFIDENCE = 0.95  # Tables, pages and documents say so beside every interval.
_LONGEST_VALUE = 24  # Of a digest in a sentence, the beginning is enough.


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval, low <= mean <= high."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RowScores:
    """What one row scored by the deciding metric.

    Attributes:
        by_seed: one score per sampling seed.
        replicates: for each seed the scores of its resamples (`deme_core.bootstrap`); empty where none were made.
    """

    by_seed: Sequence[float]
    replicates: Sequence[Sequence[float]] = ()


def interval(values: Sequence[float]) -> Interval:
    """95 % Student t interval of the mean over sampling seeds.

    With n values of mean m and standard deviation s (n - 1 in the denominator):

        m ± t(n - 1, 0.975) · s / √n

    It covers the choice of the sampling seed alone, not that of the training seed.

    Args:
        values: one score per seed, at least two.

    Returns:
        The mean and the interval around it.

    Raises:
        ValueError: for fewer than two values, or a value that is not finite.
    """
    samples = np.asarray(values, dtype=np.float64)
    if samples.ndim != 1 or samples.size < 2:
        raise ValueError(f"An interval needs the scores of at least 2 seeds, not {samples.size}.")
    if not np.isfinite(samples).all():
        raise ValueError(f"An interval needs finite scores, not {samples.tolist()}.")
    mean = float(samples.mean())
    half_width = _student_t(samples.size - 1) * float(samples.std(ddof=1)) / math.sqrt(samples.size)
    return Interval(mean=mean, low=mean - half_width, high=mean + half_width)


def _student_t(degrees_of_freedom: int) -> float:
    """Returns how many standard errors the interval reaches to either side of the mean."""
    from scipy.special import stdtrit  # scipy.stats.t.ppf, without the second that scipy.stats takes to import

    return float(stdtrit(degrees_of_freedom, (1 + _CONFIDENCE) / 2))


def paired_difference(candidate: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Interval of the mean of candidate − baseline, paired by seed.

    Args:
        candidate: one score per seed.
        baseline: the other row's scores, of the same seeds in the same order.

    Returns:
        The t interval of d_s = candidate_s − baseline_s over the seeds s.

    Raises:
        ValueError: when the numbers of seeds differ, or as `interval` raises.
    """
    if len(candidate) != len(baseline):
        raise ValueError(f"{len(candidate)} scores cannot be paired by seed with {len(baseline)}.")
    return interval([float(c) - float(b) for c, b in zip(candidate, baseline, strict=True)])


def image_difference(candidate: RowScores, baseline: RowScores) -> Interval:
    """Bootstrap interval of the mean difference over the images, generated and real, paired by image.

    With d̄ the mean over the seeds of candidate − baseline, and s* the standard deviation of d̄ over the B resamples
    of `deme_core.bootstrap`:

        d̄ ± t(B - 1, 0.975) · s*

    A Student interval and not one of percentiles: resampling shifts all replicates of a Fréchet distance upwards. It
    is wider than it must be where images do not far outnumber features (`deme_core.bootstrap`).

    Args:
        candidate: scores and replicates of one row.
        baseline: the other row's, of the same seeds. Of resamples, the first ones that both have are used: a seed
            draws the same, however many are asked for.
    """
    mean = paired_difference(candidate.by_seed, baseline.by_seed).mean
    num_shared = _num_shared_resamples(candidate, baseline)
    ours, theirs = ([seed[:num_shared] for seed in row.replicates] for row in (candidate, baseline))
    shifts = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    return _bootstrap_interval(mean, shifts)


def _bootstrap_interval(mean: float, replicates: npt.NDArray[np.float64]) -> Interval:
    """Returns mean ± t · s*, with s* the standard deviation over the resamples of the mean over seeds of (S, B)."""
    half_width = _student_t(replicates.shape[1] - 1) * float(replicates.mean(axis=0).std(ddof=1))
    return Interval(mean=mean, low=mean - half_width, high=mean + half_width)


def row_intervals(row: RowScores) -> dict[str, Interval]:
    """Returns the intervals of one row's score: over ``seeds``, and over ``images`` where they were resampled.

    They say how far the score itself depends on seeds and images. What two rows differ by varies less, since they
    share both: whether one is better is for `compare` to say.
    """
    found = {"seeds": interval(row.by_seed)}
    if (num_resamples := _num_shared_resamples(row)) >= 2:
        replicates = np.asarray([seed[:num_resamples] for seed in row.replicates], dtype=np.float64)
        found["images"] = _bootstrap_interval(found["seeds"].mean, replicates)
    return found


def differences(candidate: RowScores, baseline: RowScores) -> dict[str, Interval]:
    """Returns the intervals of candidate − baseline: over ``seeds``, and over ``images`` where both were resampled."""
    found = {"seeds": paired_difference(candidate.by_seed, baseline.by_seed)}
    if _num_shared_resamples(candidate, baseline) >= 2:
        found["images"] = image_difference(candidate, baseline)
    return found


def score_in_words(bounds: Mapping[str, float]) -> str:
    """Returns a score as tables have it, from an `Interval` as a report has it."""
    return f"{bounds['mean']:.4g} ({bounds['low']:.4g} to {bounds['high']:.4g})"


def differences_in_words(metric: str, found: Mapping[str, Interval]) -> str:
    """Returns what `differences` found in words, all of it: a verdict is not to be understood by one interval alone."""
    texts = {over: f"{each.low:+.3g} to {each.high:+.3g}" for over, each in found.items()}
    mean = f"{metric} {found['seeds'].mean:+.3g}"
    if len(texts) == 1:
        return f"{mean}, 95 % interval {texts['seeds']}"
    return f"{mean}, 95 % intervals {' and '.join(f'{text} over {over}' for over, text in texts.items())}"


def _num_shared_resamples(*rows: RowScores) -> int:
    """Returns how many resamples of each seed all rows have; 0 if one has none of some seed."""
    if any(len(row.replicates) != len(row.by_seed) for row in rows):
        return 0
    return min(len(replicates) for row in rows for replicates in row.replicates)


def lacks_images(candidate: RowScores, baseline: RowScores) -> bool:
    """Whether the interval over images is missing because one of two rows, and only one, was resampled."""
    return (_num_shared_resamples(candidate) >= 2) != (_num_shared_resamples(baseline) >= 2)


def compare(candidate: RowScores, baseline: RowScores, *, higher_is_better: bool) -> Verdict:
    """Judge a candidate row against a baseline row.

    Where lower is better: 'better' if all intervals of `differences` lie below zero, 'worse' if all lie above; where
    higher is better the other way round. Else 'too close to call', and so where `lacks_images`: the seeds alone decide
    only where neither row was resampled.

    Args:
        candidate: scores, one per seed.
        baseline: the other row's scores, of the same seeds in the same order (else ValueError).
        higher_is_better: which way the scores go.

    Returns:
        The verdict on the candidate.
    """
    intervals = differences(candidate, baseline).values()
    if lacks_images(candidate, baseline):
        return "too close to call"
    if all(difference.high < 0 for difference in intervals):
        return "worse" if higher_is_better else "better"
    if all(difference.low > 0 for difference in intervals):
        return "better" if higher_is_better else "worse"
    return "too close to call"


def differing_conditions(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns the conditions under which two evaluations differ; only if none do, scores compare.

    Each is a dotted name with both values, as ``scheduler.clip_sample (true, false)``; null is one that is not set.
    """
    different = differing_settings([first, other])
    return [f"{name} ({', '.join(map(_in_words, values))})" for name, values in sorted(different.items())]


def _in_words(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
