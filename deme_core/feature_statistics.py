"""Mean and covariance of features, from all of them at once or batch by batch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from deme_core.errors import InputError, NonFiniteImagesError

Features = npt.NDArray[np.floating[Any]]
Float64Array = npt.NDArray[np.float64]

_ROWS = 1024


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """The Gaussian that the Fréchet distance sees.

    Attributes:
        mean: mean feature vector, (D,) float64.
        covariance: covariance with n - 1 in the denominator, (D, D) float64.
        num_images: the number n of images; the rank of the covariance is below it.
    """

    mean: Float64Array
    covariance: Float64Array
    num_images: int

    @classmethod
    def from_batches(cls, batches: Iterable[Features]) -> Self:
        """Mean and covariance of batches (B, D), of which one at a time is in memory, by Chan et al. (1979).

        Args:
            batches: at least two images in all; must be finite (else InputError).
        """
        num, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
        for batch in batches:
            rows = check_features(batch, at_least=1).astype(np.float64)
            batch_mean = rows.mean(axis=0)
            centred = rows - batch_mean
            if num == 0:
                num, mean, scatter = len(rows), batch_mean, centred.T @ centred
                continue
            total, shift = num + len(rows), batch_mean - mean
            scatter += centred.T @ centred + np.outer(shift, shift) * (num * len(rows) / total)
            mean = mean + shift * (len(rows) / total)
            num = total
        if num < 2:
            raise InputError(f"Statistics need the features of at least 2 images, not {num}.")
        return cls(mean=mean, covariance=scatter / (num - 1), num_images=num)


def in_blocks(features: Features) -> Iterator[Features]:
    """Yields features (n, D) as views (at most 1024, D), of which whoever copies needs little memory."""
    for start in range(0, len(features), _ROWS):
        yield features[start : start + _ROWS]


def check_features(features: Features, *, at_least: int = 2) -> Features:
    """Returns features (n, D) if there are enough images and all values are finite (else InputError)."""
    if features.ndim != 2 or len(features) < at_least:
        raise InputError(f"Features must be of shape (at least {at_least} images, features), not {features.shape}.")
    if num_bad := sum(int((~np.isfinite(block).all(axis=1)).sum()) for block in in_blocks(features)):
        raise NonFiniteImagesError(
            f"The features of {num_bad} of {len(features)} images are NaN or infinite; check the extractor's weights."
        )
    return features


def mean_and_factor(features: Features) -> tuple[Float64Array, Float64Array]:
    """Mean (D,) and A (n, D), the centred features over √(n − 1), so that AᵀA is the covariance."""
    rows = features.astype(np.float64)
    mean = rows.mean(axis=0)
    return mean, (rows - mean) / np.sqrt(len(rows) - 1)


def factor_of(covariance: Float64Array) -> Float64Array:
    """F (rank, D) with FᵀF = covariance, from its eigenvalues above rounding error."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    kept = eigenvalues > max(eigenvalues[-1], 0.0) * len(eigenvalues) * np.finfo(np.float64).eps
    return np.sqrt(eigenvalues[kept])[:, None] * vectors[:, kept].T
