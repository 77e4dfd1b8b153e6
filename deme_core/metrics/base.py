"""What the metrics share: the protocol, and what they see of generated and real images."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from deme_core.feature_statistics import Features, Float64Array
from deme_core.reference import Reference

Counts = npt.NDArray[np.int64]
Needs = Literal["statistics", "features", "prompts"]


@dataclass(frozen=True, eq=False)
class Resamples:
    """How often each image occurs in each of B resamples, see `deme_core.bootstrap`.

    Attributes:
        generated: of the n generated images, (B, n), rows summing to n.
        real: of the m real images, (B, m), rows summing to m; None where these stay as they are.
    """

    generated: Counts
    real: Counts | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """One set of generated images, and the real ones.

    Attributes:
        features: features of the generated images, (n, D), n >= 2; metrics refuse those that are not finite.
        reference: features of the real images, by the same extractor.
        kid_subset_size: images per subset of the kernel distance.
        kid_seed: seed of those subsets, below 2**32, which scores that are to be compared must share.
        clip_scores: how well each generated image fits its prompt, (n,); None where there are no prompts.
    """

    features: Features
    reference: Reference
    kid_subset_size: int
    kid_seed: int = 0
    clip_scores: npt.NDArray[np.floating[Any]] | None = None

    @property
    def parts(self) -> list["Comparison"]:
        """The comparison by each extractor; itself where there is but one."""
        if not self.reference.widths:
            return [self]
        pairs = zip(self.reference.columns, self.reference.parts, strict=True)
        return [replace(self, features=self.features[:, columns], reference=part) for columns, part in pairs]


class Metric(Protocol):
    """A number that tells how good a set of images is."""

    @property
    def prefix(self) -> str | None:
        """What the names of its scores begin with for extractors other than Inception; None if it uses none."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether it grows as images get better; distances fall."""
        ...

    @property
    def needs(self) -> Needs:
        """What it takes: mean and covariance of the real images, all their features, or the images' prompts."""
        ...

    def score(self, comparison: Comparison) -> float:
        """Scores the generated images."""
        ...


@runtime_checkable
class DecidingMetric(Metric, Protocol):
    """A metric that may come first in a recipe: it can be resampled, and so decide a verdict."""

    def replicates(self, comparison: Comparison, resamples: Resamples) -> Float64Array:
        """Returns the score of every resample, (B,)."""
        ...


def real_features(reference: Reference) -> Features:
    """Returns the features of the real images, which a reference made for the Fréchet distance alone lacks."""
    if reference.features is None:
        raise ValueError("This reference holds statistics only: no metric but fid can be computed from it.")
    return reference.features


def check_same_width(width: int, other: int) -> None:
    """Raises a ValueError where two sets of images have other numbers of features."""
    if width != other:
        raise ValueError(f"Images with {width} features each cannot be compared with images that have {other}.")
