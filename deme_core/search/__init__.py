"""Search for merge weights: which candidates are scored, in which order (METHOD section 2).

A search knows no images: it yields batches of weights, which may be scored at once, and is sent their scores, lower
being better. All w = 0, the pretrained model, is always the first candidate, so that a search can only lose to it by
chance.
"""

import math

from deme_core.recipe import CONTROL_REACH, MethodSpec, SearchSpec
from deme_core.search.candidates import (
    Batch,
    Candidate,
    Kind,
    Search,
    Weights,
    best_candidate,
    scored_candidates,
    translated,
)
from deme_core.search.grid import control_values
from deme_core.search.halving import halve
from deme_core.search.quadratic import fit_minimum
from deme_core.search.strategies import FITTED, STRATEGIES

__all__ = [
    "STRATEGIES",
    "Batch",
    "Candidate",
    "Kind",
    "Search",
    "Weights",
    "best_candidate",
    "from_natural_weights",
    "max_candidates",
    "scored_candidates",
    "search_weights",
]


def from_natural_weights(spec: SearchSpec, method: MethodSpec) -> SearchSpec:
    """Returns the search, from where the method's natural weights are 1, not 1/N, unless it says itself from where.

    Confined copies add up to RegMean's merge there, and TIES's weights are those of its mean.
    """
    if method.method in ("regmean", "ties") and spec.initial_weight is None:
        return spec.model_copy(update={"initial_weight": 1.0})
    return spec


def search_weights(
    spec: SearchSpec, *, num_weights: int, num_copies: int, num_segments: int, is_control: bool = False
) -> Search:
    """Yields batch after batch; the candidates are what `scored_candidates` makes of them.

    Args:
        spec: the strategy and its settings. ``quadratic``, ``tpe``, ``cma_es`` and ``gp`` ask for losses
            first. With ``few_steps`` all candidates get a rough score, and the survivors alone the full one.
        num_weights: one per copy, or one per copy and block; 1 for the control, whose task vector it scales.
        num_copies: those that are merged: N, less those that the gate dropped. A search starts at the mean of them.
        num_segments: N; the control took N times the steps of a segment.
        is_control: search the control's scale, which starts at 1.
    """
    start = 1.0 if is_control else spec.initial_weight if spec.initial_weight is not None else 1.0 / num_copies
    known = [(scale,) for scale in spec.known_scales] if is_control else list(spec.known_weights)
    starts = [*known, (start,) * num_weights]
    if is_control:
        spec = spec.model_copy(update={"max_weight": max(spec.max_weight, CONTROL_REACH), "min_weight": 0.0})
    if spec.strategy in FITTED:
        # The line through theta_0 is bounded above alone: it leads where all weights but the least grow.
        lowest = 0.0 if spec.strategy == "quadratic" else spec.min_weight
        fit = fit_minimum(num_weights=num_weights, step=start, max_weight=spec.max_weight, min_weight=lowest)
        starts.insert(len(known), (yield from translated(fit, lambda weights: Batch("loss", tuple(weights)))))
    values = control_values(spec.values, num_segments) if is_control else spec.values
    strategy = STRATEGIES[spec.strategy](spec.model_copy(update={"values": values}), starts)
    if spec.few_steps is None:
        yield from translated(strategy, lambda weights: Batch("full", tuple(weights)))
    else:
        yield from halve(strategy, survivors=spec.survivors)


def max_candidates(spec: SearchSpec, *, num_weights: int, num_segments: int, is_control: bool = False) -> int:
    """Returns how many scores, rough and full, a search takes at the most."""
    return sum(max_scores(spec, num_weights=num_weights, num_segments=num_segments, is_control=is_control))


def max_scores(spec: SearchSpec, *, num_weights: int, num_segments: int, is_control: bool = False) -> tuple[int, int]:
    """Returns how many rough scores and how many full ones a search takes at the most; see `search_weights`."""
    if spec.strategy == "grid":
        values = control_values(spec.values, num_segments) if is_control else spec.values
        num_all = len(set(values)) ** num_weights + (0.0 not in values)
    else:
        num_all = spec.max_candidates
    if spec.few_steps is None:
        return 0, num_all
    return num_all, max(2, math.ceil(spec.survivors * num_all)) + 1
