"""The gate before the merge."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prefect.logging import disable_run_logger

from deme_core.binned_losses import save_losses
from deme_core.errors import BadExpertError
from deme_core.manifest import ArtifactRef
from deme_core.segments import TimestepSegment
from deme_core.verdict import Interval
from tasks.experts import Expert, judge, judge_experts, spread_weights, weights_of_merged
from tasks.jobs import JobResult
from tasks.runtime import use_runtime

SEGMENT, REF = TimestepSegment(0, 500), ArtifactRef("file:///store/finetune/a", "a")
BETTER, WORSE, SAME = Interval(-0.02, -0.03, -0.01), Interval(0.01, -0.01, 0.03), Interval(0.0, 0.0, 0.0)
PERHAPS_BETTER = Interval(-0.01, -0.03, 0.01)


@pytest.mark.parametrize(
    ("change", "policy", "merged"),
    [
        (BETTER, "drop", True),
        (BETTER, "fail", True),
        (PERHAPS_BETTER, "drop", True),
        (WORSE, "drop", False),
        (WORSE, "keep", True),
        (SAME, "drop", False),
    ],
)
def test_a_copy_that_is_no_better_on_its_own_segment_is_dropped_or_kept(
    change: Interval, policy: str, merged: bool
) -> None:
    expert = judge(SEGMENT, REF, change, policy)
    assert expert.merged == merged
    assert ("left out" in expert.sentence()) == (not merged)


def test_or_the_run_fails_with_the_numbers() -> None:
    with pytest.raises(BadExpertError, match=r"\[0, 500\) changes .* by \+1\.00% \(-1\.00% to \+3\.00%\)"):
        judge(SEGMENT, REF, WORSE, "fail")


def test_each_copy_is_judged_by_its_own_losses_on_its_own_segment(tmp_path: Path) -> None:
    # Both copies are better on the lower segment and worse on the upper one.
    losses = {"pretrained": [2.0, 2.0], "copy 0": [1.0, 3.0], "copy 1": [1.5, 4.0]}
    results = {}
    for name, of_bins in losses.items():
        (tmp_path / name).mkdir()
        save_losses(tmp_path / name, np.array([of_bins] * 3, np.float32))
        ref = ArtifactRef(f"file:///store/heldout/{name}", name)
        results[name] = JobResult(ref, {"edges": [0, 500, 1000]}, False, 0.0, 0.0)
    recipe = SimpleNamespace(merge=SimpleNamespace(on_bad_expert="drop"))
    runtime: Any = SimpleNamespace(recipe=recipe, fetch=lambda ref: tmp_path / ref.digest)
    segments, refs = [TimestepSegment(0, 500), TimestepSegment(500, 1000)], [REF, ArtifactRef("file:///store/b", "b")]
    with use_runtime(runtime), disable_run_logger():
        found = judge_experts.fn(segments, refs, [results["copy 0"], results["copy 1"]], results["pretrained"])
    assert [(each.segment, each.ref, each.merged) for each in found] == [
        (segments[0], refs[0], True),
        (segments[1], refs[1], False),
    ]
    assert [each.own_change.mean for each in found] == pytest.approx([-0.5, 1.0])


def experts(*merged: bool) -> list[Expert]:
    return [Expert(SEGMENT, REF, BETTER, merged=m) for m in merged]


@pytest.mark.parametrize(
    ("merged", "weights", "spread"),
    [
        ((True, True), (0.1, 0.2), [0.1, 0.2]),
        ((True, False, True), (0.1, 0.2), [0.1, 0.0, 0.2]),
        ((False, True), (0.1, 0.2, 0.3), [0.0, 0.0, 0.0, 0.1, 0.2, 0.3]),
        ((True, True), (), [0.5, 0.5]),
        ((False, False), (), [0.0, 0.0]),
    ],
)
def test_a_dropped_copy_has_the_weight_zero(
    merged: tuple[bool, ...], weights: tuple[float, ...], spread: list[float]
) -> None:
    assert spread_weights(experts(*merged), weights) == spread


def test_of_known_weights_those_of_a_dropped_copy_are_left_out() -> None:
    assert weights_of_merged(experts(True, False, True), (0.1, 0.2, 0.3)) == (0.1, 0.3)
