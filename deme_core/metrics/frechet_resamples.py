"""Fréchet distances of many resamples of the same images, without what they share being computed for each."""

from dataclasses import dataclass

import numpy as np

from deme_core.feature_statistics import Features, Float64Array, check_features, factor_of, in_blocks
from deme_core.metrics.base import Counts, Resamples, check_same_width
from deme_core.metrics.gaussians import assemble, sum_of_roots, trace_of_root
from deme_core.reference import Reference

# Inner products of generated and real images that are kept: 0.8 GB.
_MOST_PRODUCTS = 10**8


def frechet_replicates(features: Features, reference: Reference, resamples: Resamples) -> Float64Array:
    """Fréchet distances (B,) of resamples of generated images from resamples of the real ones, or from all of them.

    With A and B the centred features of two resamples, each row over √(n − 1), tr (Σ_a Σ_b)^½ is the nuclear norm of
    ABᵀ: the sum of the roots of the eigenvalues of (ABᵀ)(ABᵀ)ᵀ, or of (ABᵀ)ᵀ(ABᵀ). Where fewer images are drawn than
    there are features, that takes no covariance.

    Args:
        features: features of the generated images, (n, D); must be finite (else InputError).
        reference: the real images; their features, where these are resampled, too.
        resamples: B of them.
    """
    features = check_features(features)
    check_same_width(features.shape[1], len(reference.statistics.mean))
    ours = _Drawn.of(features, resamples.generated)
    if resamples.real is None:
        return _to_all_real(ours, reference)
    assert reference.features is not None, "real images are resampled by their features"
    theirs = _Drawn.of(reference.features, resamples.real)
    products = _products(ours, theirs) if _takes_products(ours, theirs) else None
    return np.array([_distance(ours, theirs, index, products) for index in range(len(resamples.generated))])


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Resamples of one set of images.

    Attributes:
        features: (n, D).
        centre: mean of all features (D,), taken off before squares are summed, for the digits of the result.
        counts: (B, n).
        means: of each resample, less the centre, (B, D).
        traces: of the covariance of each resample, (B,).
    """

    features: Features
    centre: Float64Array
    counts: Counts
    means: Float64Array
    traces: Float64Array

    @classmethod
    def of(cls, features: Features, counts: Counts) -> "_Drawn":
        num = len(features)
        centre = np.sum([block.sum(axis=0, dtype=np.float64) for block in in_blocks(features)], axis=0) / num
        means, squares, start = np.zeros((len(counts), features.shape[1])), np.zeros(len(counts)), 0
        for block in in_blocks(features):
            rows, own = block - centre, counts[:, start : start + len(block)]
            means += own @ rows
            squares += own @ np.square(rows).sum(axis=1)
            start += len(block)
        means /= num
        return cls(features, centre, counts, means, (squares - num * np.square(means).sum(axis=1)) / (num - 1))

    def covariance(self, index: int) -> Float64Array:
        """Returns the covariance (D, D) of a resample."""
        num, start = len(self.features), 0
        squares = np.zeros((self.features.shape[1], self.features.shape[1]))
        for block in in_blocks(self.features):
            count = self.counts[index, start : start + len(block)]
            drawn = count > 0
            rows = (block[drawn] - self.centre) * np.sqrt(count[drawn])[:, None]
            squares += rows.T @ rows
            start += len(block)
        mean = self.means[index]
        covariance: Float64Array = (squares - num * np.outer(mean, mean)) / (num - 1)
        return covariance


def _takes_products(ours: _Drawn, theirs: _Drawn) -> bool:
    """Whether some resample draws no more images than there are features, and the products are not too many."""
    fewest = min(int(np.count_nonzero(drawn.counts, axis=1).min()) for drawn in (ours, theirs))
    return fewest <= ours.features.shape[1] and len(ours.features) * len(theirs.features) <= _MOST_PRODUCTS


def _products(ours: _Drawn, theirs: _Drawn) -> Float64Array:
    """Returns the inner products (n, m) of all centred features."""
    rows, start = ours.features - ours.centre, 0
    products = np.empty((len(rows), len(theirs.features)))
    for block in in_blocks(theirs.features):
        products[:, start : start + len(block)] = rows @ (block - theirs.centre).T
        start += len(block)
    return products


def _distance(ours: _Drawn, theirs: _Drawn, index: int, products: Float64Array | None) -> float:
    shift = (ours.means[index] + ours.centre) - (theirs.means[index] + theirs.centre)
    fewest = min(np.count_nonzero(ours.counts[index]), np.count_nonzero(theirs.counts[index]))
    if products is not None and fewest <= ours.features.shape[1]:
        root = _root_of_products(products, ours.counts[index], theirs.counts[index])
    else:
        root = trace_of_root(_factor(theirs.covariance(index)), ours.covariance(index))
    return assemble(shift, ours.traces[index] + theirs.traces[index], root)


def _root_of_products(products: Float64Array, our_count: Counts, their_count: Counts) -> float:
    """Returns the nuclear norm of ABᵀ from the products of features that are centred on other means."""
    ours, theirs = our_count > 0, their_count > 0
    our_weights, their_weights = our_count[ours].astype(np.float64), their_count[theirs].astype(np.float64)
    drawn = products[np.ix_(ours, theirs)]
    drawn -= our_weights @ drawn / our_weights.sum()
    drawn -= (drawn @ their_weights / their_weights.sum())[:, None]
    drawn *= np.sqrt(our_weights / (our_weights.sum() - 1))[:, None]
    drawn *= np.sqrt(their_weights / (their_weights.sum() - 1))
    return sum_of_roots(_smaller_gram(drawn))


def _to_all_real(ours: _Drawn, reference: Reference) -> Float64Array:
    """Returns the distances from all real images, of which a factor F with FᵀF = Σ_b is computed once."""
    real = reference.statistics
    projected = (ours.features - ours.centre) @ reference.factor.T
    real_trace, found = float(np.trace(real.covariance)), []
    for count, mean, trace in zip(ours.counts, ours.means, ours.traces, strict=True):
        drawn = count > 0
        weights = count[drawn].astype(np.float64)
        rows = projected[drawn]
        rows = (rows - weights @ rows / weights.sum()) * np.sqrt(weights / (weights.sum() - 1))[:, None]
        shift = mean + ours.centre - real.mean
        found.append(assemble(shift, trace + real_trace, sum_of_roots(_smaller_gram(rows))))
    return np.array(found)


def _smaller_gram(rows: Float64Array) -> Float64Array:
    gram: Float64Array = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    return gram


def _factor(covariance: Float64Array) -> Float64Array:
    """F (k, D) with FᵀF = covariance, the cheap one unless it is singular."""
    try:
        return np.asarray(np.linalg.cholesky(covariance).T, np.float64)
    except np.linalg.LinAlgError:
        return factor_of(covariance)
