"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

from dataclasses import dataclass

import numpy as np

from deme_core.errors import InputError
from deme_core.feature_statistics import Features, Float64Array
from deme_core.metrics.base import Comparison, Needs, real_features

# Well above the rounding of a squared distance, and about what float32 features resolve: a point exactly on a
# ball's surface, such as an image that is in both sets, is inside, however the matrix product is summed.
_SLACK = 1e-13


@dataclass(frozen=True)
class Precision:
    """The metric `precision`: the share of generated images that lie among the real ones."""

    prefix: str = "precision"
    higher_is_better: bool = True
    needs: Needs = "features"

    def score(self, comparison: Comparison) -> float:
        """Returns the share, 0 to 1."""
        return precision(comparison.features, real_features(comparison.reference))


@dataclass(frozen=True)
class Recall:
    """The metric `recall`: the share of real images that lie among the generated ones."""

    prefix: str = "recall"
    higher_is_better: bool = True
    needs: Needs = "features"

    def score(self, comparison: Comparison) -> float:
        """Returns the share, 0 to 1."""
        return recall(comparison.features, real_features(comparison.reference))


def precision(generated: Features, real: Features, *, num_neighbours: int = 3, block_size: int = 1024) -> float:
    """Share of generated images among the real ones.

    A point is among a set if it lies within the ball of one of its points, whose radius is the distance to that
    point's k-th nearest other point (equations 1 and 2 of the paper).

    Args:
        generated: features of generated images, (n, D).
        real: features of real images, (m, D).
        num_neighbours: k; 3 in the paper.
        block_size: rows of distances held at once, each max(n, m) float64 numbers. Changes no result.

    Returns:
        The share, 0 to 1.

    Raises:
        InputError: if the features are not finite, or a set has no k-th neighbour.
        ValueError: if they are not of one width.
    """
    return _share(generated, real, real, num_neighbours, block_size)


def recall(generated: Features, real: Features, *, num_neighbours: int = 3, block_size: int = 1024) -> float:
    """Share of real images among the generated ones: `precision` with the sets exchanged."""
    return _share(real, generated, real, num_neighbours, block_size)


def _share(points: Features, others: Features, real: Features, num_neighbours: int, block_size: int) -> float:
    _check(points, others, num_neighbours, block_size)
    centre = real.mean(axis=0, dtype=np.float64)  # distances of centred features lose fewer digits
    return _share_among(points - centre, others - centre, num_neighbours, block_size)


def _check(points: Features, others: Features, num_neighbours: int, block_size: int) -> None:
    if num_neighbours < 1 or block_size < 1:
        raise ValueError(f"Neighbours and block size must be at least 1, not {num_neighbours} and {block_size}.")
    for features in (points, others):
        if num_neighbours >= len(features):
            raise InputError(f"{len(features)} images have no {num_neighbours} neighbours each; give more images.")
    if points.ndim != 2 or others.ndim != 2 or points.shape[1] != others.shape[1]:
        raise ValueError(f"Features of shapes {points.shape} and {others.shape} cannot be compared.")
    if not (np.isfinite(points).all() and np.isfinite(others).all()):
        raise InputError("Features that are NaN or infinite have no distances.")


def _share_among(points: Float64Array, others: Float64Array, num_neighbours: int, block_size: int) -> float:
    """The share of points (n, D) that lie in a ball of the others (m, D)."""
    radii = _squared_radii(others, num_neighbours, block_size)
    num_inside = 0
    for start in range(0, len(points), block_size):
        distances = _squared_distances(points[start : start + block_size], others, slack=_SLACK)
        num_inside += int((distances <= radii).any(axis=1).sum())
    return num_inside / len(points)


def _squared_radii(points: Float64Array, num_neighbours: int, block_size: int) -> Float64Array:
    """Squared distance of each point (n, D) to its k-th nearest other point, (n,)."""
    radii = np.empty(len(points))
    for start in range(0, len(points), block_size):
        distances = _squared_distances(points[start : start + block_size], points)
        rows = np.arange(len(distances))
        distances[rows, start + rows] = np.inf  # no point is its own neighbour
        radii[start + rows] = np.partition(distances, num_neighbours - 1, axis=1)[:, num_neighbours - 1]
    return radii


def _squared_distances(points: Float64Array, others: Float64Array, *, slack: float = 0.0) -> Float64Array:
    """‖x‖² + ‖y‖² − 2 xᵀy, (n, m), a little less with slack."""
    norms = (points**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)
    squared: Float64Array = (1 - slack) * norms - 2 * (points @ others.T)
    return squared
