"""Timestep segments: how [0, T) is divided."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deme_core.errors import InputError
from deme_core.recipe import SegmentsSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, order=True)
class TimestepSegment:
    """The half-open range of timesteps [low, high)."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"[{self.low}, {self.high})"

    def __len__(self) -> int:
        return self.high - self.low

    def __contains__(self, timestep: int) -> bool:
        return self.low <= timestep < self.high

    def holds(self, timesteps: "torch.Tensor") -> "torch.Tensor":
        """Returns which of the timesteps, int64 (B,), lie in it: bool (B,)."""
        return (timesteps >= self.low) & (timesteps < self.high)


def equal_segments(count: int, num_train_timesteps: int) -> tuple[TimestepSegment, ...]:
    """Divides [0, T) into ``count`` segments whose lengths differ by at most one.

    Raises:
        InputError: there are fewer timesteps than segments.
    """
    if not 1 <= count <= num_train_timesteps:
        raise InputError(f"segments.count {count} must lie between 1 and num_train_timesteps {num_train_timesteps}.")
    return segments_from_edges([i * num_train_timesteps // count for i in range(count + 1)], num_train_timesteps)


def segments_from_edges(edges: Sequence[int], num_train_timesteps: int) -> tuple[TimestepSegment, ...]:
    """Divides [0, T) at ``edges`` = 0, …, T.

    Raises:
        InputError: the edges do not partition [0, T).
    """
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != num_train_timesteps:
        raise InputError(f"segments.edges {list(edges)} must start at 0 and end at {num_train_timesteps}.")
    if any(low >= high for low, high in itertools.pairwise(edges)):
        raise InputError(f"segments.edges {list(edges)} must increase strictly.")
    return tuple(TimestepSegment(low, high) for low, high in itertools.pairwise(edges))


def recipe_segments(spec: SegmentsSpec, num_train_timesteps: int) -> tuple[TimestepSegment, ...]:
    """Returns the segments a recipe asks for.

    Raises:
        InputError: they do not partition [0, T).
    """
    if spec.edges is not None:
        return segments_from_edges(spec.edges, num_train_timesteps)
    assert spec.count is not None
    return equal_segments(spec.count, num_train_timesteps)


def segment_index(segments: Sequence[TimestepSegment], timestep: int) -> int:
    """Returns the number of the segment that a timestep is in (else ValueError)."""
    for index, segment in enumerate(segments):
        if timestep in segment:
            return index
    raise ValueError(f"timestep {timestep} is in none of the segments {[str(segment) for segment in segments]}")
