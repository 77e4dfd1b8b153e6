"""The parts of the squared Fréchet distance of two Gaussians: |μ_a − μ_b|² + tr Σ_a + tr Σ_b − 2 tr (Σ_a Σ_b)^½."""

import numpy as np

from deme_core.feature_statistics import Float64Array


def trace_of_root(factor: Float64Array, covariance: Float64Array) -> float:
    """Trace of (FᵀF Σ)^½ for a factor F (k, D) and a covariance Σ (D, D)."""
    return sum_of_roots(factor @ covariance @ factor.T)


def sum_of_roots(gram: Float64Array) -> float:
    """Sum of the square roots of the eigenvalues of a matrix (k, k) that is positive but for rounding."""
    return float(np.sqrt(np.linalg.eigvalsh(gram).clip(min=0)).sum())


def assemble(mean_difference: Float64Array, sum_of_traces: float, root: float) -> float:
    """Squared distance of two Gaussians from the difference of their means, the sum of their traces and the root's."""
    return max(float(mean_difference @ mean_difference + sum_of_traces - 2 * root), 0.0)
