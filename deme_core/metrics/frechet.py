"""Fréchet distance (Heusel et al. 2017, arXiv 1706.08500): FID where the features are Inception's."""

from dataclasses import dataclass

import numpy as np

from deme_core.feature_statistics import (
    Features,
    FeatureStatistics,
    Float64Array,
    check_features,
    factor_of,
    mean_and_factor,
)
from deme_core.metrics.base import Comparison, Counts, Needs, check_same_width
from deme_core.reference import Reference


@dataclass(frozen=True)
class FrechetDistance:
    """The metric `fid`."""

    prefix: str = "fd"
    higher_is_better: bool = False
    needs: Needs = "statistics"

    def score(self, comparison: Comparison) -> float:
        """Returns the distance."""
        return frechet_distance_to(comparison.reference, comparison.features)

    def replicates(self, comparison: Comparison, counts: Counts) -> Float64Array:
        """Returns the distance of each resample."""
        return frechet_replicates(comparison.features, comparison.reference, counts)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Fréchet distance of two Gaussians (Heusel et al., 2017, equation 6).

        d² = |μ_a − μ_b|² + tr Σ_a + tr Σ_b − 2 tr (Σ_a Σ_b)^½

    The last trace is the sum of the roots of the eigenvalues of F Σ_a Fᵀ, where FᵀF = Σ_b: exact for
    singular covariances also, unlike a matrix square root of the product.

    Args:
        a: statistics of one set of images.
        b: statistics of the other, with the same number of features (else ValueError).

    Returns:
        d², 0 or greater.
    """
    check_same_width(len(a.mean), len(b.mean))
    fewer, more = sorted((a, b), key=lambda statistics: statistics.num_images)
    trace_of_root = _trace_of_root(factor_of(fewer.covariance), more.covariance)
    return _assemble(a.mean - b.mean, np.trace(a.covariance) + np.trace(b.covariance), trace_of_root)


def frechet_distance_to(reference: Reference, features: Features) -> float:
    """`frechet_distance` of features from a reference, by the fastest exact way.

    With no more images than features, tr (Σ_a Σ_b)^½ is the nuclear norm of A Fᵀ, where AᵀA = Σ_a are the
    centred features over √(n − 1) and FᵀF = Σ_b: no covariance of the n images is ever formed.

    Args:
        reference: features of the real images.
        features: features of the generated images, (n, D), n >= 2; must be finite (else ValueError).

    Returns:
        d², 0 or greater.
    """
    features = check_features(features)
    check_same_width(features.shape[1], len(reference.statistics.mean))
    mean, rows = mean_and_factor(features)
    real = reference.statistics
    if len(rows) <= features.shape[1]:
        trace_of_root = float(np.linalg.svd(rows @ reference.factor.T, compute_uv=False).sum())
    else:
        trace_of_root = _trace_of_root(reference.factor, rows.T @ rows)
    return _assemble(mean - real.mean, np.square(rows).sum() + np.trace(real.covariance), trace_of_root)


def frechet_replicates(features: Features, reference: Reference, counts: Counts) -> Float64Array:
    """Fréchet distances without a covariance of the generated images where there are fewer of them than features.

    With A the resample's centred features over √(n − 1) and FᵀF the real covariance, tr (Σ_a Σ_b)^½ is the sum of the
    roots of the eigenvalues of (A Fᵀ)(A Fᵀ)ᵀ, or of (A Fᵀ)ᵀ(A Fᵀ), whichever is smaller.

    Args:
        features: features of the generated images, (n, D); must be finite (else InputError).
        reference: the real images.
        counts: resamples (B, n).
    """
    rows = check_features(features).astype(np.float64)
    real = reference.statistics
    projected = rows @ reference.factor.T
    real_trace = float(np.trace(real.covariance))
    return np.array([_frechet_once(rows, projected, real.mean, real_trace, count) for count in counts])


def _frechet_once(
    rows: Float64Array, projected: Float64Array, real_mean: Float64Array, real_trace: float, count: Counts
) -> float:
    drawn = count > 0
    weights = count[drawn].astype(np.float64)
    num = weights.sum()
    mean = weights @ rows[drawn] / num
    total_square = float(weights @ np.square(rows[drawn]).sum(axis=1))
    trace = (total_square - num * float(mean @ mean)) / (num - 1)
    root = projected[drawn]
    root = (root - weights @ root / num) * np.sqrt(weights / (num - 1))[:, None]
    gram = root @ root.T if root.shape[0] <= root.shape[1] else root.T @ root
    trace_of_root = float(np.sqrt(np.linalg.eigvalsh(gram).clip(min=0)).sum())
    shift = mean - real_mean
    return _assemble(shift, trace + real_trace, trace_of_root)


def _trace_of_root(factor: Float64Array, covariance: Float64Array) -> float:
    """Trace of (FᵀF Σ)^½ for a factor F (k, D) and a covariance Σ (D, D)."""
    eigenvalues = np.linalg.eigvalsh(factor @ covariance @ factor.T)
    return float(np.sqrt(eigenvalues.clip(min=0)).sum())


def _assemble(mean_difference: Float64Array, sum_of_traces: float, trace_of_root: float) -> float:
    return max(float(mean_difference @ mean_difference + sum_of_traces - 2 * trace_of_root), 0.0)
