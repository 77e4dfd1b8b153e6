"""Too few images for a Fréchet distance: no error, but the user should know."""

from collections.abc import Mapping
from typing import Any

from deme_core.recipe import EvaluateSpec

# It has 48 features, and every network more: the largest number is never its own where there is a network.
_FEWEST_FEATURES = "pixels_4x4"


def few_images_warning(evaluate: EvaluateSpec, reference: Mapping[str, Any], *, num_images: int) -> str | None:
    """Returns what to tell the user, if a Fréchet distance is asked for of fewer images than features.

    Args:
        evaluate: which metrics are computed, with which extractor.
        reference: metrics of the reference's artifact, with the largest number of features of any extractor; older
            ones do not say how many there are.
        num_images: generated images that are scored: a candidate of a search has others than a row of the report.
    """
    num_features = reference.get("num_features", 0)
    sets = {"real": reference["num_images"], "generated": num_images}
    few = [f"{number:,} {kind}" for kind, number in sets.items() if number < num_features]
    if "fid" not in evaluate.metrics or not few:
        return None
    networks = [name for name in evaluate.extractor_names if name != _FEWEST_FEATURES] or [_FEWEST_FEATURES]
    several = f"features of {' and '.join(networks)} (up to {num_features:,})"
    features = several if len(networks) > 1 else f"{num_features:,} features of {networks[0]}"
    return (
        f"{' and '.join(few)} images are fewer than the {features}: a Fréchet distance of so few depends on their "
        "number, and is lower for images that vary less; kid has no such bias (evaluate.metrics: [kid, fid])."
    )
