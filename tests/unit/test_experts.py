"""The gate before the merge."""

import pytest

from deme_core.errors import BadExpertError
from deme_core.manifest import ArtifactRef
from deme_core.segments import TimestepSegment
from deme_core.verdict import Interval
from tasks.experts import Expert, judge, spread_weights

SEGMENT, REF = TimestepSegment(0, 500), ArtifactRef("file:///store/finetune/a", "a")
BETTER, WORSE, SAME = Interval(-0.02, -0.03, -0.01), Interval(0.01, -0.01, 0.03), Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "policy", "merged"),
    [
        (BETTER, "drop", True),
        (BETTER, "fail", True),
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
