"""How timesteps are divided among copies."""

from typing import Self

from pydantic import Field, model_validator

from deme_core.recipe.base import Spec


class SegmentsSpec(Spec):
    """How [0, T) is divided: N equal segments, or explicit edges."""

    count: int | None = Field(None, ge=1, description="Number of equal segments.")
    edges: tuple[int, ...] | None = Field(None, description="0, inner edges, T: strictly increasing.")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.count is None) == (self.edges is None):
            raise ValueError("give either count or edges")
        if self.edges is not None:
            if len(self.edges) < 2 or self.edges[0] != 0:
                raise ValueError(f"edges {list(self.edges)} must start at 0 and end at num_train_timesteps")
            if any(low >= high for low, high in zip(self.edges, self.edges[1:], strict=False)):
                raise ValueError(f"edges {list(self.edges)} must increase strictly")
        return self

    @property
    def num_segments(self) -> int:
        """Number of segments N."""
        return self.count if self.count is not None else len(self.edges or ()) - 1
