"""Fréchet distance (Heusel et al. 2017, arXiv 1706.08500): FID where the features are Inception's."""

from dataclasses import dataclass

import numpy as np

from deme_core.feature_statistics import Features, Float64Array, check_features, mean_and_factor
from deme_core.metrics.base import Comparison, Needs, Resamples, check_same_width
from deme_core.metrics.frechet_resamples import frechet_replicates
from deme_core.metrics.gaussians import assemble, trace_of_root
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

    def replicates(self, comparison: Comparison, resamples: Resamples) -> Float64Array:
        """Returns the distance of each resample."""
        return frechet_replicates(comparison.features, comparison.reference, resamples)


def frechet_distance_to(reference: Reference, features: Features) -> float:
    """Fréchet distance of two Gaussians (Heusel et al., 2017, equation 6), by the fastest exact way.

        d² = |μ_a − μ_b|² + tr Σ_a + tr Σ_b − 2 tr (Σ_a Σ_b)^½

    The last trace is the sum of the roots of the eigenvalues of F Σ_a Fᵀ, where FᵀF = Σ_b: exact for
    singular covariances also, unlike a matrix square root of the product. With no more images than features, it is the
    nuclear norm of A Fᵀ, where A are the centred features over √(n − 1), so that AᵀA = Σ_a: no covariance of
    the n images is ever formed.

    Args:
        reference: features of the real images.
        features: features of the generated images, (n, D), n >= 2, D that of the reference; must be finite
            (else ValueError).

    Returns:
        d², 0 or greater.
    """
    features = check_features(features)
    check_same_width(features.shape[1], len(reference.statistics.mean))
    mean, rows = mean_and_factor(features)
    real = reference.statistics
    if len(rows) <= features.shape[1]:
        root = float(np.linalg.svd(rows @ reference.factor.T, compute_uv=False).sum())
    else:
        root = trace_of_root(reference.factor, rows.T @ rows)
    return assemble(mean - real.mean, np.square(rows).sum() + np.trace(real.covariance), root)
