"""CLIP score (Hessel et al. 2021, arXiv 2104.08718): how well images fit their prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_core.feature_statistics import Float64Array
from deme_core.metrics.base import Comparison, Needs, Resamples

# Columns of a table of prompts by which scores are told apart: those of PartiPrompts.
_GROUPING_COLUMNS = ("category", "challenge")


@dataclass(frozen=True)
class MeanClipScore:
    """The metric `clip_score`: the mean over the images of what `deme_core.extractors.clip.ClipScore` gives each."""

    prefix: None = None
    higher_is_better: bool = True
    needs: Needs = "prompts"

    def score(self, comparison: Comparison) -> float:
        """Returns the mean."""
        return float(_by_image(comparison).mean())

    def replicates(self, comparison: Comparison, resamples: Resamples) -> Float64Array:
        """Returns the mean of each resample; real images are nothing to it."""
        counts = resamples.generated
        found: Float64Array = counts @ _by_image(comparison) / counts.sum(axis=1)
        return found


def grouped_scores(
    clip_scores: npt.NDArray[np.floating[Any]], columns: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Means by category and by challenge, where the prompts have such columns.

    Args:
        clip_scores: one score per image, (n,).
        columns: what else is known of each prompt; image i belongs to entry i modulo their number.

    Returns:
        Means over the images of a group, by names such as ``clip_score/category/Animals``.
    """
    scores = clip_scores.astype(np.float64)
    return dict(_grouped(scores, columns))


def _grouped(scores: Float64Array, columns: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, float]]:
    for name, values in columns.items():
        if name.lower() not in _GROUPING_COLUMNS:
            continue
        of_images = np.array([values[index % len(values)] for index in range(len(scores))])
        for value in sorted(set(of_images.tolist())):
            yield f"clip_score/{name.lower()}/{value}", float(scores[of_images == value].mean())


def _by_image(comparison: Comparison) -> Float64Array:
    if comparison.clip_scores is None:
        raise ValueError("The CLIP score needs the score of each image with its prompt; there are none.")
    return comparison.clip_scores.astype(np.float64)
