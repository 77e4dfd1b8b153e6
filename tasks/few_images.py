"""A reference too small for a Fréchet distance: no error, but the user should know."""

from collections.abc import Mapping
from typing import Any

from deme_core.recipe import EvaluateSpec


def few_images_warning(evaluate: EvaluateSpec, reference: Mapping[str, Any]) -> str | None:
    """Returns what to tell the user, if a Fréchet distance is asked for of fewer real images than features.

    Args:
        evaluate: which metrics are computed, with which extractor.
        reference: metrics of the reference's artifact; older ones do not say how many features there are.
    """
    num_images, num_features = reference["num_images"], reference.get("num_features", 0)
    if "fid" not in evaluate.metrics or num_images >= num_features:
        return None
    return (
        f"the reference holds {num_images} real images, fewer than the {num_features} features of "
        f"{' and '.join(evaluate.extractor_names)}: their covariance is singular, and the Fréchet distance depends on "
        "the number of images; kid suits few images (evaluate.metrics: [kid, fid])."
    )
