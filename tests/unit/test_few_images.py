import io
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
from rich.console import Console

from deme_core.errors import InputError
from deme_core.extractor_names import ExtractorName
from deme_core.manifest import ArtifactRef
from deme_core.recipe import EvaluateSpec
from deme_core.recipe_file import load_recipe
from deme_core.reference import Reference
from flows.progress_display import ProgressDisplay
from tasks import stages
from tasks.few_images import few_images_warning
from tasks.jobs import JobResult
from tasks.progress import Event, subscribe, tell, waiting
from tasks.work.scoring import check_extractor

FID = EvaluateSpec(num_images=5000)
KID = FID.model_copy(update={"metrics": ("kid",)})
SMALL = {"num_images": 500, "num_features": 2048}


def test_a_reference_smaller_than_its_features_is_warned_of_with_both_numbers() -> None:
    warning = few_images_warning(FID, SMALL, num_images=5000)
    assert warning is not None
    for word in ("500 real images", "2,048", "inception", "kid"):
        assert word in warning


def test_few_generated_images_are_warned_of_too() -> None:
    many_real = {**SMALL, "num_images": 5000}
    assert "600 generated images are fewer" in str(few_images_warning(FID, many_real, num_images=600))
    assert "500 real and 600 generated images" in str(few_images_warning(FID, SMALL, num_images=600))


@pytest.mark.parametrize(
    ("extractor", "more", "told"),
    [
        ("inception", ("pixels_4x4",), "the 2,048 features of inception:"),
        ("pixels_4x4", ("inception",), "the 2,048 features of inception:"),
        ("inception", ("dinov2_vitl14",), "than the features of inception and dinov2_vitl14 (up to 2,048):"),
    ],
)
def test_only_networks_are_said_to_have_so_many_features(
    extractor: ExtractorName, more: tuple[ExtractorName, ...], told: str
) -> None:
    evaluate = EvaluateSpec(num_images=600, extractor=extractor, more_extractors=more)
    assert told in str(few_images_warning(evaluate, SMALL, num_images=600))


def test_pixels_alone_are_named_with_their_own_features() -> None:
    evaluate = EvaluateSpec(num_images=40, extractor="pixels_4x4")
    warning = few_images_warning(evaluate, {"num_images": 40, "num_features": 48}, num_images=40)
    assert "the 48 features of pixels_4x4:" in str(warning)


@pytest.mark.parametrize(
    ("evaluate", "reference"), [(KID, SMALL), (FID, {**SMALL, "num_images": 2048}), (FID, {"num_images": 500})]
)
def test_no_warning_without_cause(evaluate: EvaluateSpec, reference: dict[str, int]) -> None:
    assert few_images_warning(evaluate, reference, num_images=2048) is None


@pytest.mark.parametrize(("part", "told"), [("search", "100 generated images"), ("report", None)])
def test_a_search_is_warned_of_the_images_of_its_own_candidates(
    part: Literal["search", "report"], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["evaluate.num_images=5000", "merge.search.num_images=100", "merge.weights=null"]
    metrics = {"num_images": 5000, "num_features": 2048}
    built = JobResult(ArtifactRef("file:///a/b", "b"), metrics, cached=False, seconds=0.0, storage_seconds=0.0)
    runtime = SimpleNamespace(recipe=load_recipe("digits", overrides), run=lambda _job, task: built)
    monkeypatch.setattr(stages, "current_runtime", lambda: runtime)
    heard: list[Event] = []
    end = subscribe(heard.append)
    stages.build_reference.fn(part, None, [built])
    end()
    messages = [event.record["message"] for event in heard]
    assert (told in messages[0]) if told else not messages


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_warning_is_printed_in_the_terminal(is_terminal: bool) -> None:
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, force_terminal=is_terminal, width=200)):
        tell(Event("reference", "warning", {"message": "few [images]."}))
    assert "reference: few [images]." in out.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_job_waits_for_is_told_where_no_bar_shows_it(is_terminal: bool) -> None:
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, force_terminal=is_terminal, width=200)):
        tell(Event("search", "progress", waiting("GPU 0")))
        tell(Event("merge", "progress", {"message": "merging"}))
    assert ("search: waits for GPU 0" in out.getvalue()) != is_terminal
    assert is_terminal or "merging" not in out.getvalue()


def test_an_extractor_whose_weights_changed_since_the_reference_is_refused() -> None:
    reference = Reference(np.ones((2, 4), np.float32), "efficientnet_lite0", "recorded")
    check_extractor("efficientnet_lite0", "recorded", reference)
    with pytest.raises(InputError, match=r"digest other here.*made with recorded; .*extractor_weights"):
        check_extractor("efficientnet_lite0", "other", reference)
