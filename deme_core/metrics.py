"""Fréchet and kernel distance, precision and recall, from the features of generated and of real images.

Scores are comparable only among rows with equal counts of images and one extractor; `metric_name` keeps the
scales of different extractors apart.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from deme_core.feature_statistics import (
    Features,
    FeatureStatistics,
    Float64Array,
    check_features,
    factor_of,
    mean_and_factor,
)
from deme_core.precision_recall import precision_recall
from deme_core.reference import Reference

Metric = Literal["fid", "kid", "precision", "recall"]
# After clean-fid's own names for its modes; the scales of all of them differ.
_INCEPTION_SUFFIXES = {
    "inception": "",
    "inception_legacy_pytorch": "_legacy_pytorch",
    "inception_legacy_tensorflow": "_legacy_tensorflow",
}
_OTHER_EXTRACTORS = ("efficientnet_lite0", "dinov2_vitl14", "clip_vit_b_32")
_PREFIXES: dict[str, str] = {"fid": "fd", "kid": "kd", "precision": "precision", "recall": "recall"}


def metric_name(metric: Metric, extractor_name: str) -> str:
    """Name a score is reported under: plain 'fid' and 'kid' belong to Inception in clean-fid's mode clean alone.

    Args:
        metric: 'fid' (Fréchet distance), 'kid' (kernel distance), 'precision' or 'recall' (Kynkäänniemi et al. 2019).
        extractor_name: name of a feature extractor.

    Returns:
        For example ``fid``, ``fid_legacy_pytorch`` or ``fd_efficientnet_lite0``.

    Raises:
        ValueError: for an unknown metric or extractor.
    """
    if metric not in _PREFIXES or extractor_name not in (*_INCEPTION_SUFFIXES, *_OTHER_EXTRACTORS):
        raise ValueError(f"There is no metric {metric!r} of extractor {extractor_name!r}.")
    if extractor_name in _INCEPTION_SUFFIXES:
        return f"{metric}{_INCEPTION_SUFFIXES[extractor_name]}"
    return f"{_PREFIXES[metric]}_{extractor_name}"


def higher_is_better(name: str) -> bool:
    """Whether a metric, called as `metric_name` does, grows as images get better; distances fall."""
    return name.startswith(("precision", "recall"))


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
    _check_same_width(len(a.mean), len(b.mean))
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
    _check_same_width(features.shape[1], len(reference.statistics.mean))
    mean, rows = mean_and_factor(features)
    real = reference.statistics
    if len(rows) <= features.shape[1]:
        trace_of_root = float(np.linalg.svd(rows @ reference.factor.T, compute_uv=False).sum())
    else:
        trace_of_root = _trace_of_root(reference.factor, rows.T @ rows)
    return _assemble(mean - real.mean, np.square(rows).sum() + np.trace(real.covariance), trace_of_root)


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
    _check_same_width(features.shape[1], reference_features.shape[1])
    if subset_size < 2 or num_subsets < 1:
        raise ValueError(f"KID needs subsets of at least 2 images, not {num_subsets} subsets of {subset_size}.")
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        distance = cleanfid_kernel_distance(reference_features, features, num_subsets, subset_size)
    finally:
        np.random.set_state(state)
    return float(distance)


def score(
    features: Features, reference: Reference, *, metrics: Sequence[Metric], kid_subset_size: int, kid_seed: int = 0
) -> dict[str, float]:
    """All metrics of one set of generated images.

    Args:
        features: features of the generated images, (n, D), n >= 2; must be finite (else ValueError).
        reference: features of the real images, by the same extractor.
        metrics: which metrics to compute.
        kid_subset_size: images per subset of the kernel distance.
        kid_seed: seed of those subsets: one constant for all that is compared.

    Returns:
        Scores by `metric_name`, in the order of metrics; see `higher_is_better`.
    """
    scores: dict[str, float] = {}
    shares = (math.nan,) * 2
    if {"precision", "recall"} & set(metrics):
        shares = precision_recall(features, real_features(reference))
    for metric in metrics:
        name = metric_name(metric, reference.extractor_name)
        if metric == "fid":
            scores[name] = frechet_distance_to(reference, features)
        elif metric in ("precision", "recall"):
            scores[name] = shares[metric == "recall"]
        else:
            real = real_features(reference)
            scores[name] = kernel_distance(features, real, subset_size=kid_subset_size, seed=kid_seed)
    return scores


def needs_features(metrics: Sequence[Metric]) -> bool:
    """Whether a reference must keep the features themselves; for the Fréchet distance mean and covariance do."""
    return any(metric != "fid" for metric in metrics)


def real_features(reference: Reference) -> Features:
    """Returns the features of the real images, which a reference made for the Fréchet distance alone lacks."""
    if reference.features is None:
        raise ValueError("This reference holds statistics only: no metric but fid can be computed from it.")
    return reference.features


def _check_same_width(width: int, other: int) -> None:
    if width != other:
        raise ValueError(f"Images with {width} features each cannot be compared with images that have {other}.")


def _trace_of_root(factor: Float64Array, covariance: Float64Array) -> float:
    """Trace of (FᵀF Σ)^½ for a factor F (k, D) and a covariance Σ (D, D)."""
    eigenvalues = np.linalg.eigvalsh(factor @ covariance @ factor.T)
    return float(np.sqrt(eigenvalues.clip(min=0)).sum())


def _assemble(mean_difference: Float64Array, sum_of_traces: float, trace_of_root: float) -> float:
    return max(float(mean_difference @ mean_difference + sum_of_traces - 2 * trace_of_root), 0.0)
