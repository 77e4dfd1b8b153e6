"""How far a score depends on which images were drawn: the bootstrap over generated images (Efron 1979).

The same resamples serve all rows that share initial noise: image i of one row belongs to image i of the other, so
that what they have in common cancels in the difference of their replicates. The real images stay as they are. An
image drawn twice makes a set look less varied than it is, which shifts all replicates of the Fréchet distance
upwards: their spread is meant to be used, not their mean.
"""

import numpy as np
import numpy.typing as npt

from deme_core.feature_statistics import Features, Float64Array, check_features
from deme_core.metrics import Metric, real_features
from deme_core.reference import Reference
from deme_core.seeds import derive_seed

Counts = npt.NDArray[np.int64]
_ROWS = 1024


def resample(num_images: int, *, num_replicates: int, seed: int) -> Counts:
    """Returns how often each image occurs in each resample, (B, n), rows summing to n.

    Args:
        num_images: n.
        num_replicates: B.
        seed: names the image set; sets that are to be compared share it.
    """
    generator = np.random.default_rng(derive_seed("bootstrap", seed, num_images))
    uniform = np.full(num_images, 1 / num_images)
    return generator.multinomial(num_images, uniform, size=num_replicates)


def replicates(metric: Metric, features: Features, reference: Reference, counts: Counts) -> Float64Array:
    """Returns the metric of every resample, (B,).

    Args:
        metric: 'fid' or 'kid'.
        features: of the generated images, (n, D); must be finite (else InputError).
        reference: the real images.
        counts: resamples (B, n).
    """
    features = check_features(features)
    if metric == "fid":
        return _frechet(features, reference, counts)
    assert metric == "kid", metric
    return _kernel(features, real_features(reference), counts)


def _frechet(features: Features, reference: Reference, counts: Counts) -> Float64Array:
    """Fréchet distances without a covariance of the generated images where there are fewer of them than features.

    With A the resample's centred features over √(n − 1) and FᵀF the real covariance, tr (Σ_a Σ_b)^½ is the sum of the
    roots of the eigenvalues of (A Fᵀ)(A Fᵀ)ᵀ, or of (A Fᵀ)ᵀ(A Fᵀ), whichever is smaller.
    """
    rows = features.astype(np.float64)
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
    return max(float(shift @ shift) + trace + real_trace - 2 * trace_of_root, 0.0)


def _kernel(features: Features, real: Features, counts: Counts) -> Float64Array:
    """Unbiased squared MMD over pairs of different images, with k(x, y) = (x·y/D + 1)³."""
    weights = counts.astype(np.float64)
    within, across = np.zeros(len(counts)), np.zeros(len(counts))
    for start in range(0, len(features), _ROWS):
        block = features[start : start + _ROWS]
        own = weights[:, start : start + _ROWS]
        kernel = _cubic(block, features)
        kernel[np.arange(len(block)), start + np.arange(len(block))] = 0.0
        within += ((own @ kernel) * weights).sum(axis=1)
        across += own @ _cubic(block, real).mean(axis=1)
    # The sum of w_i w_j over different images is smaller than n (n − 1), since duplicates make no pair.
    pairs = np.square(weights.sum(axis=1)) - np.square(weights).sum(axis=1)
    return within / pairs - 2 * across / len(features) + _mean_of_pairs(real)


def _mean_of_pairs(features: Features) -> float:
    """Mean kernel of all pairs of different images."""
    num, total = len(features), 0.0
    for start in range(0, num, _ROWS):
        kernel = _cubic(features[start : start + _ROWS], features)
        total += float(kernel.sum() - np.trace(kernel, offset=start))
    return total / (num * (num - 1))


def _cubic(left: Features, right: Features) -> Float64Array:
    inner: Float64Array = left.astype(np.float64) @ right.astype(np.float64).T
    return np.power(inner / left.shape[1] + 1, 3)
