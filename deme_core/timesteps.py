"""Training timesteps: how they are drawn, and whether what was drawn is what was asked for."""

import itertools
from dataclasses import dataclass
from operator import itemgetter

import torch

from deme_core.errors import TimestepHistogramError
from deme_core.segments import TimestepSegment

# A correct sampler fails the check once in a billion runs; a wrong one is seen within a few hundred draws.
_MIN_P_VALUE = 1e-9
_MIN_EXPECTED_DRAWS = 10.0
_NUM_BINS = 10  # Of the histogram; the segment's edges are further ones.


@dataclass(frozen=True)
class TimestepSampler:
    """Draws training timesteps: with probability p from [0, T), else from ``segment`` (METHOD section 1).

    The share drawn outside the segment is p (1 - |segment| / T), not p: the global draw can land inside.

    Attributes:
        per_batch_mirrored: draw the range once per batch and pair each t with low + high - 1 - t, as the
            paper's code does; otherwise each sample draws its own range, which has lower variance.
    """

    segment: TimestepSegment
    num_train_timesteps: int
    global_sampling_probability: float = 0.0
    per_batch_mirrored: bool = False

    def __call__(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Returns ``batch_size`` timesteps, int64 (B,), on the generator's device."""
        everything = TimestepSegment(0, self.num_train_timesteps)
        if self.per_batch_mirrored:
            is_global = torch.rand((), generator=generator, device=generator.device) < self.global_sampling_probability
            chosen = everything if is_global else self.segment
            half = _uniform(chosen, (batch_size + 1) // 2, generator)
            return torch.cat([half, chosen.low + chosen.high - 1 - half])[:batch_size]
        is_global = torch.rand(batch_size, generator=generator, device=generator.device) < (
            self.global_sampling_probability
        )
        inside = _uniform(self.segment, batch_size, generator)
        return torch.where(is_global, _uniform(everything, batch_size, generator), inside)

    def probabilities(self) -> torch.Tensor:
        """Returns the probability of each timestep, float64 (T,), summing to one."""
        p = self.global_sampling_probability
        density = torch.full((self.num_train_timesteps,), p / self.num_train_timesteps, dtype=torch.float64)
        density[self.segment.low : self.segment.high] += (1 - p) / len(self.segment)
        return density


def _uniform(segment: TimestepSegment, size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(segment.low, segment.high, (size,), generator=generator, device=generator.device)


def histogram_p_value(counts: torch.Tensor, sampler: TimestepSampler, *, draws_per_decision: int = 1) -> float:
    """Returns how likely so uneven a histogram is, if ``sampler`` drew it (Pearson's chi-squared test).

    Args:
        counts: how often each timestep was drawn, int64 (T,).
        sampler: what should have drawn them.
        draws_per_decision: draws that share one choice of range; the variance is inflated by it, which
            makes the test conservative for ``per_batch_mirrored``.
    """
    total = int(counts.sum())
    if total == 0:
        return 1.0
    probabilities = sampler.probabilities()
    if (counts[probabilities == 0] > 0).any():
        return 0.0
    bins = []
    for low, high in _bin_edges(sampler):
        observed = int(counts[low:high].sum()) / draws_per_decision
        expected = float(probabilities[low:high].sum()) * total / draws_per_decision
        bins.append((expected, observed))
    pooled = _pool_rare_bins(bins)
    statistic = sum((observed - expected) ** 2 / expected for expected, observed in pooled)
    halves = torch.tensor([max(len(pooled) - 1, 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*halves))


def _pool_rare_bins(bins: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Joins the rarest bins until each expects enough draws for the chi-squared distribution to hold in its tail."""
    pooled: list[tuple[float, float]] = []
    for expected, observed in sorted(bins, key=itemgetter(0)):  # Not by what was observed: that would bias it.
        if pooled and pooled[-1][0] < _MIN_EXPECTED_DRAWS:
            pooled[-1] = (pooled[-1][0] + expected, pooled[-1][1] + observed)
        else:
            pooled.append((expected, observed))
    if len(pooled) > 1 and pooled[-1][0] < _MIN_EXPECTED_DRAWS:
        (expected, observed), (last_expected, last_observed) = pooled[-2:]
        pooled[-2:] = [(expected + last_expected, observed + last_observed)]
    return pooled


def _bin_edges(sampler: TimestepSampler) -> list[tuple[int, int]]:
    inner = {sampler.segment.low, sampler.segment.high, 0, sampler.num_train_timesteps}
    inner |= {i * sampler.num_train_timesteps // _NUM_BINS for i in range(_NUM_BINS)}
    edges = sorted(inner)
    return list(itertools.pairwise(edges))


def check_histogram(counts: torch.Tensor, sampler: TimestepSampler, *, draws_per_decision: int = 1) -> None:
    """Raises TimestepHistogramError if ``counts`` (int64, (T,)) contradict ``sampler``."""
    p_value = histogram_p_value(counts, sampler, draws_per_decision=draws_per_decision)
    if p_value < _MIN_P_VALUE:
        share = float(counts[sampler.segment.low : sampler.segment.high].sum() / counts.sum())
        raise TimestepHistogramError(
            f"The timesteps drawn contradict the settings (p-value {p_value:.1e}): {share:.3f} of them lie in "
            f"{sampler.segment}, with global_sampling_probability {sampler.global_sampling_probability}."
        )
