import io

import numpy as np
import pytest
from rich.console import Console

from deme_core.errors import InputError
from deme_core.recipe import EvaluateSpec
from deme_core.reference import Reference
from flows.progress_display import ProgressDisplay
from tasks.few_images import few_images_warning
from tasks.progress import Event, tell
from tasks.work.scoring import check_extractor

FID = EvaluateSpec(num_images=5000)
KID = EvaluateSpec(num_images=2, metrics=("kid",))
SMALL = {"num_images": 500, "num_features": 2048}


def test_a_reference_smaller_than_its_features_is_warned_of_with_both_numbers() -> None:
    warning = few_images_warning(FID, SMALL)
    assert warning is not None
    for word in ("500 real images", "2,048", "inception", "kid"):
        assert word in warning


def test_few_generated_images_are_warned_of_too() -> None:
    few = FID.model_copy(update={"num_images": 600})
    assert "600 generated images are fewer" in str(few_images_warning(few, {**SMALL, "num_images": 5000}))
    assert "500 real and 600 generated images" in str(few_images_warning(few, SMALL))


@pytest.mark.parametrize(
    ("evaluate", "reference"), [(KID, SMALL), (FID, {**SMALL, "num_images": 2048}), (FID, {"num_images": 500})]
)
def test_no_warning_without_cause(evaluate: EvaluateSpec, reference: dict[str, int]) -> None:
    assert few_images_warning(evaluate, reference) is None


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_warning_is_printed_in_the_terminal(is_terminal: bool) -> None:
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, force_terminal=is_terminal, width=200)):
        tell(Event("reference", "warning", {"message": "few [images]."}))
    assert "reference: few [images]." in out.getvalue()


def test_an_extractor_whose_weights_changed_since_the_reference_is_refused() -> None:
    reference = Reference(np.ones((2, 4), np.float32), "efficientnet_lite0", "recorded")
    check_extractor("efficientnet_lite0", "recorded", reference)
    with pytest.raises(InputError, match=r"digest other here.*made with recorded; .*extractor_weights"):
        check_extractor("efficientnet_lite0", "other", reference)
