"""Kernel distance (Bińkowski et al. 2018, arXiv 1801.01401): KID where the features are Inception's."""

from dataclasses import dataclass

import numpy as np

from deme_core.feature_statistics import Features, Float64Array, check_features
from deme_core.metrics.base import Comparison, Needs, Resamples, check_same_width, real_features

_ROWS = 1024


@dataclass(frozen=True)
class KernelDistance:
    """The metric `kid`."""

    prefix: str = "kd"
    higher_is_better: bool = False
    needs: Needs = "features"

    def score(self, comparison: Comparison) -> float:
        """Returns the mean over random subsets."""
        real = real_features(comparison.reference)
        return kernel_distance(
            comparison.features, real, subset_size=comparison.kid_subset_size, seed=comparison.kid_seed
        )

    def replicates(self, comparison: Comparison, resamples: Resamples) -> Float64Array:
        """Returns the unbiased estimate of each resample's whole set."""
        return kernel_replicates(comparison.features, real_features(comparison.reference), resamples)


def kernel_distance(
    features: Features, reference_features: Features, *, subset_size: int, num_subsets: int = 100, seed: int
) -> float:
    """Kernel distance: unbiased squared MMD with k(x, y) = (x·y/D + 1)³, mean over random subsets.

    This is clean-fid's own function with its draws made reproducible; NumPy's global generator is left as it was.

    Args:
        features: features of the generated images, (n, D).
        reference_features: features of the real images, (m, D).
        subset_size: images per subset; both counts, where smaller, cap it.
        num_subsets: how many subsets are averaged.
        seed: decides which images the subsets hold; scores to be compared must share it.

    Returns:
        The distance; as an unbiased estimate it may be slightly negative.

    Raises:
        ValueError: for subsets of fewer than two images, wrong shapes, or features that are not finite.
    """
    from cleanfid.fid import kernel_distance as cleanfid_kernel_distance

    features, reference_features = check_features(features), check_features(reference_features)
    check_same_width(features.shape[1], reference_features.shape[1])
    if subset_size < 2 or num_subsets < 1:
        raise ValueError(f"KID needs subsets of at least 2 images, not {num_subsets} subsets of {subset_size}.")
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        distance = cleanfid_kernel_distance(reference_features, features, num_subsets, subset_size)
    finally:
        np.random.set_state(state)
    return float(distance)


def kernel_replicates(features: Features, real: Features, resamples: Resamples) -> Float64Array:
    """Unbiased squared MMD over pairs of different images, of every resample.

    Args:
        features: features of the generated images, (n, D); must be finite (else InputError).
        real: features of the real images, (m, D).
        resamples: B of them.
    """
    features = check_features(features)
    ours = resamples.generated.astype(np.float64)
    theirs = np.ones((1, len(real))) if resamples.real is None else resamples.real.astype(np.float64)
    across = np.zeros(len(ours))
    for start in range(0, len(features), _ROWS):
        kernel = _cubic(features[start : start + _ROWS], real)
        across += ((ours[:, start : start + _ROWS] @ kernel) * theirs).sum(axis=1)
    across /= len(features) * len(real)
    return _mean_of_pairs(features, ours) - 2 * across + _mean_of_pairs(real, theirs)


def _mean_of_pairs(features: Features, weights: Float64Array) -> Float64Array:
    """Mean kernel (B,) of all pairs of different images, each image taken as often as a row of (B, n) says.

    A resample of one image x alone, as half of those of two images are, has no pair. It stands for a model that makes
    nothing else, all of whose pairs are k(x, x).
    """
    total, alone = np.zeros((2, len(weights)))
    for start in range(0, len(features), _ROWS):
        block, own = features[start : start + _ROWS], weights[:, start : start + _ROWS]
        kernel = _cubic(block, features)
        rows = np.arange(len(block))
        alone += own @ kernel[rows, start + rows] / len(features)
        kernel[rows, start + rows] = 0.0
        total += ((own @ kernel) * weights).sum(axis=1)
    # The sum of w_i w_j over different images is smaller than n (n − 1), since duplicates make no pair.
    pairs = np.square(weights.sum(axis=1)) - np.square(weights).sum(axis=1)
    return np.where(pairs > 0, total / np.maximum(pairs, 1), alone)


def _cubic(left: Features, right: Features) -> Float64Array:
    inner: Float64Array = left.astype(np.float64) @ right.astype(np.float64).T
    return np.power(inner / left.shape[1] + 1, 3)
