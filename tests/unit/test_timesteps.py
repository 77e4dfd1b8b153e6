from collections.abc import Iterator

import pytest
import torch

from deme_core.errors import TimestepHistogramError
from deme_core.segments import TimestepSegment
from deme_core.timesteps import TimestepSampler, check_histogram, histogram_p_value

T = 1000
LOW = TimestepSegment(0, 250)
HIGH = TimestepSegment(900, 1000)
ODD = TimestepSegment(333, 334)
ALL = TimestepSegment(0, T)


def counts(sampler: TimestepSampler, *, num_batches: int, batch_size: int = 64, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    draws = torch.cat([sampler(batch_size, rng) for _ in range(num_batches)])
    return torch.bincount(draws, minlength=sampler.num_train_timesteps)


def p_values(sampler: TimestepSampler, *, num_draws: int, num_seeds: int) -> Iterator[float]:
    for seed in range(num_seeds):
        yield histogram_p_value(counts(sampler, num_batches=1, batch_size=num_draws, seed=seed), sampler)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("segment", [LOW, HIGH, ODD, ALL])
def test_the_share_outside_the_segment_is_p_times_the_share_of_other_timesteps(
    segment: TimestepSegment, p: float
) -> None:
    probabilities = TimestepSampler(segment, T, p).probabilities()

    inside = probabilities[segment.low : segment.high]
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(probabilities.sum() - inside.sum()) == pytest.approx(p * (1 - len(segment) / T), abs=1e-12)
    assert float(inside.max() - inside.min()) == 0.0


@pytest.mark.parametrize("per_batch_mirrored", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("segment", [LOW, HIGH, ODD, ALL])
def test_both_kinds_draw_what_the_probabilities_say(
    segment: TimestepSegment, p: float, per_batch_mirrored: bool
) -> None:
    # Batches of 2 hold one decision and one mirrored pair; many of them average both out.
    sampler = TimestepSampler(segment, T, p, per_batch_mirrored)
    drawn = counts(sampler, num_batches=3_000 if p == 0.3 else 500, batch_size=2).double()

    check_histogram(drawn.long(), sampler, draws_per_decision=2 if per_batch_mirrored else 1)
    share_inside = float(drawn[segment.low : segment.high].sum() / drawn.sum())
    expected = float(sampler.probabilities()[segment.low : segment.high].sum())
    assert share_inside == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_draws_are_int64_of_the_batch_size(batch_size: int) -> None:
    for mirrored in (False, True):
        drawn = TimestepSampler(LOW, T, 0.5, mirrored)(batch_size, torch.Generator().manual_seed(0))
        assert drawn.dtype == torch.int64
        assert drawn.shape == (batch_size,)


def test_a_mirrored_batch_is_pairs_in_one_range() -> None:
    sampler = TimestepSampler(HIGH, T, 0.5, per_batch_mirrored=True)
    rng = torch.Generator().manual_seed(0)
    kinds = set()
    for _ in range(50):
        first, second = sampler(8, rng).chunk(2)
        sums = set((first + second).tolist())
        assert len(sums) == 1
        kinds |= sums
        if sums == {HIGH.low + HIGH.high - 1}:
            assert all(t in HIGH for t in torch.cat([first, second]).tolist())
    assert kinds == {HIGH.low + HIGH.high - 1, T - 1}


def test_an_odd_mirrored_batch_leaves_one_timestep_without_its_mirror_image() -> None:
    sampler = TimestepSampler(HIGH, T, 0.0, per_batch_mirrored=True)
    drawn = sampler(7, torch.Generator().manual_seed(0))
    assert (drawn[:3] + drawn[4:]).tolist() == [HIGH.low + HIGH.high - 1] * 3


def test_per_sample_batches_mix_both_ranges() -> None:
    sampler = TimestepSampler(LOW, T, 0.5)
    rng = torch.Generator().manual_seed(0)
    assert all(0 < sum(t in LOW for t in sampler(64, rng).tolist()) < 64 for _ in range(20))


def test_the_same_generator_gives_the_same_timesteps() -> None:
    sampler = TimestepSampler(LOW, T, 0.3)
    first, again, other = (sampler(64, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize("p", [0.001, 0.01, 0.3])
@pytest.mark.parametrize("num_draws", [16, 320, 5000])
def test_a_correct_sampler_is_hardly_ever_suspected(p: float, num_draws: int) -> None:
    # A p-value below 1e-4 is due once in 10,000 runs; few draws of rare timesteps must not bring it more often.
    assert min(p_values(TimestepSampler(LOW, T, p), num_draws=num_draws, num_seeds=150)) > 1e-5


def test_pooling_rare_bins_does_not_lower_p_values() -> None:
    values = torch.tensor(list(p_values(TimestepSampler(LOW, T, 0.3), num_draws=64, num_seeds=2000)))
    assert float((values < 0.01).double().mean()) < 0.016


def test_p_values_of_many_draws_are_spread_evenly() -> None:
    values = torch.tensor(list(p_values(TimestepSampler(LOW, T, 0.3), num_draws=5000, num_seeds=400)))
    for level in (0.05, 0.25, 0.5, 0.75):
        assert float((values < level).double().mean()) == pytest.approx(level, abs=0.08)


@pytest.mark.parametrize(
    "claimed",
    [
        TimestepSampler(LOW, T, 0.1),
        TimestepSampler(LOW, T, 0.9),
        TimestepSampler(LOW, T, 1.0),
        TimestepSampler(HIGH, T, 0.3),
        TimestepSampler(TimestepSegment(0, 500), T, 0.3),
        TimestepSampler(TimestepSegment(0, 125), T, 0.3),
    ],
    ids=str,
)
def test_other_settings_than_those_drawn_with_are_seen_within_a_thousand_draws(claimed: TimestepSampler) -> None:
    drawn = counts(TimestepSampler(LOW, T, 0.3), num_batches=15)
    with pytest.raises(TimestepHistogramError, match=r"contradict the settings .* lie in \[\d+, \d+\), with global"):
        check_histogram(drawn, claimed)


def test_an_uneven_sampler_is_seen() -> None:
    drawn = counts(TimestepSampler(TimestepSegment(0, 100), T), num_batches=15)
    drawn += counts(TimestepSampler(TimestepSegment(100, 250), T), num_batches=15)
    with pytest.raises(TimestepHistogramError):
        check_histogram(drawn, TimestepSampler(LOW, T))


def test_one_draw_of_an_impossible_timestep_is_an_error() -> None:
    sampler = TimestepSampler(LOW, T, 0.0)
    drawn = counts(sampler, num_batches=100)
    check_histogram(drawn, sampler)
    drawn[250] += 1
    with pytest.raises(TimestepHistogramError, match=r"p-value 0\.0e"):
        check_histogram(drawn, sampler)


def test_mirrored_batches_need_their_size_as_draws_per_decision() -> None:
    sampler = TimestepSampler(LOW, T, 0.3, per_batch_mirrored=True)
    histograms = [counts(sampler, num_batches=100, seed=seed) for seed in range(20)]

    for histogram in histograms:
        check_histogram(histogram, sampler, draws_per_decision=64)
    with pytest.raises(TimestepHistogramError):
        for histogram in histograms:
            check_histogram(histogram, sampler)


def test_a_wrong_p_of_mirrored_batches_is_seen() -> None:
    drawn = counts(TimestepSampler(LOW, T, 0.9, per_batch_mirrored=True), num_batches=200)
    with pytest.raises(TimestepHistogramError):
        check_histogram(drawn, TimestepSampler(LOW, T, 0.3, per_batch_mirrored=True), draws_per_decision=64)


def test_no_draws_contradict_nothing() -> None:
    check_histogram(torch.zeros(T, dtype=torch.int64), TimestepSampler(LOW, T))
