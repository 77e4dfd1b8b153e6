"""Every combination of given values: the paper's search."""

import itertools
from collections.abc import Sequence

from deme_core.search.candidates import Strategy

# More than any machine has workers; a large grid shall not become as many waiting tasks.
_BATCH_SIZE = 64


def control_values(values: Sequence[float], num_segments: int) -> tuple[float, ...]:
    """Returns the scales a grid offers the control: each value, and each value N times over.

    N segments at weight v move as far from the pretrained model as the control at scale N v, at the most.
    """
    return tuple(sorted({scale for value in values for scale in (value, value * num_segments)} | {1.0}))


def grid_search(values: Sequence[float], *, num_weights: int) -> Strategy:
    """Yields every combination of ``values``, the pretrained model first."""
    others = (w for w in itertools.product(dict.fromkeys(values), repeat=num_weights) if any(w))
    everything = itertools.chain([(0.0,) * num_weights], others)
    while batch := list(itertools.islice(everything, _BATCH_SIZE)):
        yield batch
