import math

import pytest

from deme_core.verdict import (
    Interval,
    RowScores,
    Verdict,
    differences,
    differing_conditions,
    interval,
    lacks_images,
    paired_difference,
    row_intervals,
)
from deme_core.verdict import compare as compare_either_way


def compare(candidate: RowScores, baseline: RowScores) -> Verdict:
    """The verdict where lower is better; where higher is, the scores turned round must get the same."""
    verdict = compare_either_way(candidate, baseline, higher_is_better=False)
    turned = [
        RowScores([-s for s in row.by_seed], [[-s for s in seed] for seed in row.replicates])
        for row in (candidate, baseline)
    ]
    assert compare_either_way(*turned, higher_is_better=True) == verdict
    return verdict


def test_interval_matches_the_table_of_student_t() -> None:
    # t(2, 0.975) = 4.302653, from any printed table; the sample deviation of 1, 2, 3 is 1.
    result = interval([1.0, 2.0, 3.0])
    assert result.mean == pytest.approx(2.0)
    assert result.high - result.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert result.mean - result.low == pytest.approx(result.high - result.mean)


def test_equal_values_have_an_interval_without_width() -> None:
    assert interval([2.5, 2.5, 2.5]) == Interval(2.5, 2.5, 2.5)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_interval_refuses_too_few_or_non_finite_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="An interval needs"):
        interval(values)


def test_pairing_sees_a_small_gain_that_the_spread_over_seeds_would_hide() -> None:
    baseline = [10.0, 12.0, 14.0]
    candidate = [9.8, 11.81, 13.79]
    assert interval(candidate).high > interval(baseline).low  # unpaired, the intervals overlap widely
    assert compare(RowScores(candidate), RowScores(baseline)) == "better"
    assert compare(RowScores(baseline), RowScores(candidate)) == "worse"


def test_an_interval_that_holds_zero_is_too_close_to_call() -> None:
    assert compare(RowScores([9.0, 12.5, 13.0]), RowScores([10.0, 12.0, 14.0])) == "too close to call"
    assert compare(RowScores([10.0, 12.0, 14.0]), RowScores([10.0, 12.0, 14.0])) == "too close to call"


def test_the_verdict_is_that_of_the_paired_interval() -> None:
    candidate, baseline = [1.0, 2.0, 2.5], [1.5, 2.2, 3.1]
    difference = paired_difference(candidate, baseline)
    assert difference.mean == pytest.approx(-1.3 / 3)
    mirrored = paired_difference(baseline, candidate)
    assert (mirrored.low, mirrored.high) == pytest.approx((-difference.high, -difference.low))
    assert difference.low < 0 < difference.high
    assert compare(RowScores(candidate), RowScores(baseline)) == "too close to call"
    # The same mean, spread less over the seeds.
    narrower = paired_difference(steady := [1.1, 1.7, 2.7], baseline)
    assert narrower.high < 0
    assert compare(RowScores(steady), RowScores(baseline)) == "better"


def test_scores_of_different_seeds_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="paired"):
        compare(RowScores([1.0, 2.0, 3.0]), RowScores([1.0, 2.0]))


def replicates(*means: float, spread: float) -> list[list[float]]:
    return [[mean - spread, mean, mean + spread] for mean in means]


def test_both_the_seeds_and_the_images_must_agree_on_a_verdict() -> None:
    baseline = RowScores([10.0, 12.0, 14.0], replicates(10.0, 12.0, 14.0, spread=0.0))
    scores = [9.8, 11.81, 13.79]
    sure = RowScores(scores, replicates(*scores, spread=0.01))
    unsure = RowScores(scores, replicates(*scores, spread=1.0))
    assert compare(sure, baseline) == "better"
    assert compare(unsure, baseline) == "too close to call"
    assert set(differences(unsure, baseline)) == {"seeds", "images"}


def test_the_seeds_alone_decide_only_where_neither_row_was_resampled() -> None:
    scores, theirs = [9.8, 11.81, 13.79], [10.0, 12.0, 14.0]
    plain, resampled = RowScores(scores), RowScores(theirs, replicates(*theirs, spread=0.01))
    assert compare(plain, RowScores(theirs)) == "better"
    for ours in (plain, RowScores(scores, [[], [], []]), RowScores(scores, [[score] for score in scores])):
        assert lacks_images(ours, resampled)
        assert lacks_images(resampled, ours)
        assert compare(ours, resampled) == compare(resampled, ours) == "too close to call"
        assert not lacks_images(ours, RowScores(theirs))
    assert not lacks_images(resampled, resampled)


def test_the_interval_over_images_is_centred_on_the_scores_not_on_the_replicates() -> None:
    baseline = RowScores([10.0, 12.0], replicates(20.0, 22.0, spread=0.0))
    candidate = RowScores([9.0, 11.0], replicates(25.0, 27.0, spread=0.1))
    difference = differences(candidate, baseline)["images"]
    assert difference.mean == pytest.approx(-1.0)
    # The sample deviation of three resamples 0.1 apart is 0.1; t(2, 0.975) = 4.302653.
    assert difference.high - difference.mean == pytest.approx(4.302653 * 0.1, rel=1e-5)


def test_a_row_alone_has_both_intervals_around_its_own_score() -> None:
    row = RowScores([10.0, 12.0, 14.0], replicates(20.0, 22.0, 24.0, spread=0.3))
    found = row_intervals(row)
    assert found["seeds"] == interval([10.0, 12.0, 14.0])
    assert found["images"].mean == 12.0
    assert found["images"].high - 12.0 == pytest.approx(4.302653 * 0.3, rel=1e-5)
    assert set(row_intervals(RowScores([10.0, 12.0]))) == {"seeds"}


def test_images_that_raise_one_seed_and_lower_another_by_as_much_leave_the_mean_sure() -> None:
    images = row_intervals(RowScores([10.0, 12.0], [[9.0, 10.0, 11.0], [13.0, 12.0, 11.0]]))["images"]
    assert images.low == images.high == 11.0


def test_the_interval_over_images_has_the_quantile_of_its_resamples() -> None:
    resamples = [*[1.0] * 50, *[-1.0] * 50]
    found = row_intervals(RowScores([0.0, 0.0], [resamples, resamples]))["images"]
    # t(99, 0.975) = 1.984217, from any printed table.
    assert found.high == pytest.approx(1.984217 * math.sqrt(100 / 99), rel=1e-6)


def test_rows_share_the_resamples_that_both_have() -> None:
    baseline = RowScores([10.0, 12.0], replicates(10.0, 12.0, spread=0.0))
    scores = [9.0, 11.0]
    longer = RowScores(scores, [[*values, 99.0] for values in replicates(*scores, spread=0.1)])
    assert differences(longer, baseline) == differences(RowScores(scores, replicates(*scores, spread=0.1)), baseline)
    assert set(differences(RowScores(scores, [[], []]), baseline)) == {"seeds"}


def test_conditions_that_differ_are_named_to_the_leaf_with_both_values() -> None:
    first = {
        "eta": 0.0,
        "scheduler": {"clip_sample": True, "beta_end": 0.02, "trained_betas": None},
        "shape": [1, 8, 8],
    }
    other = {
        "eta": 0.0,
        "guidance_scale": 2.0,
        "scheduler": {"clip_sample": False, "beta_end": 0.02, "timestep_spacing": "trailing"},
        "shape": [1, 8, 8],
        "reference": {"images": "a" * 64},
    }
    assert differing_conditions(first, first) == []
    assert differing_conditions(first, other) == [
        "guidance_scale (null, 2.0)",
        f"reference.images (null, {'a' * 23}…)",
        "scheduler.clip_sample (true, false)",
        "scheduler.timestep_spacing (null, trailing)",
    ]
