"""Every combination of given values: the paper's search."""

import itertools
from collections.abc import Iterator, Sequence

from deme_core.search.candidates import Candidate, Objective


def control_values(values: Sequence[float], num_segments: int) -> tuple[float, ...]:
    """Returns the scales a grid offers the control: each value, and each value N times over.

    N segments at weight v move as far from the pretrained model as the control at scale N v, at the most.
    """
    return tuple(sorted({scale for value in values for scale in (value, value * num_segments)} | {1.0}))


def grid_search(objective: Objective, values: Sequence[float], *, num_weights: int) -> Iterator[Candidate]:
    """Yields every combination of ``values``, the pretrained model first."""
    zero = (0.0,) * num_weights
    yield Candidate(zero, objective(zero))
    for weights in itertools.product(dict.fromkeys(values), repeat=num_weights):
        if any(weights):
            yield Candidate(weights, objective(weights))
