"""Search for merge weights: which candidates are tried, in which order (METHOD section 2).

A search knows no images: it is given an objective, lower being better, and proposes weights. All w = 0, the
pretrained model, is always the first candidate, so that a search can only lose to it by chance.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from deme_core.recipe import SearchSpec

Weights = tuple[float, ...]
Objective = Callable[[Weights], float]


@dataclass(frozen=True)
class Candidate:
    """Merge weights and the score they got; lower is better."""

    weights: Weights
    score: float


def search_weights(
    objective: Objective, spec: SearchSpec, *, num_weights: int, num_segments: int
) -> Iterator[Candidate]:
    """Yields every candidate as it is scored; the best is the one with the lowest score.

    Args:
        objective: scores weights.
        spec: the strategy and its settings.
        num_weights: N, or 1 for the control, whose single weight scales its task vector.
        num_segments: N; the control took N times the steps of a segment and starts at scale 1.
    """
    if spec.strategy == "grid":
        values = spec.values if num_weights > 1 else control_values(spec.values, num_segments)
        yield from grid_search(objective, values, num_weights=num_weights)
    else:
        is_control = num_weights == 1 < num_segments
        start = 1.0 / num_weights if spec.initial_weight is None or is_control else spec.initial_weight
        yield from coordinate_search(
            objective,
            (start,) * num_weights,
            step_size=spec.step_size,
            max_candidates=spec.max_candidates,
        )


def max_candidates(spec: SearchSpec, *, num_weights: int, num_segments: int) -> int:
    """Returns how many candidates a search scores at the most."""
    if spec.strategy == "coordinate":
        return spec.max_candidates
    values = spec.values if num_weights > 1 else control_values(spec.values, num_segments)
    return len({*itertools.product(values, repeat=num_weights), (0.0,) * num_weights})


def control_values(values: Sequence[float], num_segments: int) -> tuple[float, ...]:
    """Returns the scales a grid offers the control: each value, and each value N times over.

    N segments at weight v move as far from the pretrained model as the control at scale N v, at the most.
    """
    return tuple(sorted({scale for value in values for scale in (value, value * num_segments)} | {1.0}))


def grid_search(objective: Objective, values: Sequence[float], *, num_weights: int) -> Iterator[Candidate]:
    """Yields every combination of ``values``, the pretrained model first: the paper's search."""
    zero = (0.0,) * num_weights
    yield Candidate(zero, objective(zero))
    for weights in itertools.product(dict.fromkeys(values), repeat=num_weights):
        if any(weights):
            yield Candidate(weights, objective(weights))


def coordinate_search(
    objective: Objective, start: Weights, *, step_size: float, max_candidates: int, min_step_size: float = 0.02
) -> Iterator[Candidate]:
    """Yields a pattern search (Hooke and Jeeves 1961) from ``start``.

    Moves along the common scale of all weights first and then along each weight, both ways, keeps every
    improvement, goes on in a direction that helped, and halves the step when none helps. The best candidate so
    far, the pretrained model included, is always the place it searches around.

    Args:
        objective: scores weights.
        start: the first weights after all zeros.
        step_size: first step.
        max_candidates: score at most so many, the pretrained model included.
        min_step_size: give up below this step.
    """
    scored: dict[Weights, float] = {}

    def score(weights: Weights) -> Iterator[Candidate]:
        if weights not in scored and len(scored) < max_candidates:
            scored[weights] = objective(weights)
            yield Candidate(weights, scored[weights])

    yield from score((0.0,) * len(start))
    yield from score(start)
    best = min(scored, key=scored.__getitem__)
    while step_size >= min_step_size and len(scored) < max_candidates:
        improved = False
        for direction in _directions(len(start)):
            for sign in (1.0, -1.0):
                moved = _moved(best, direction, sign * step_size)
                while moved != best:
                    yield from score(moved)
                    if scored.get(moved, float("inf")) >= scored[best]:
                        break
                    best, improved = moved, True
                    moved = _moved(best, direction, sign * step_size)
        if not improved:
            step_size /= 2


def _directions(size: int) -> list[Weights]:
    axes = [tuple(float(i == axis) for i in range(size)) for axis in range(size)]
    return [(1.0,) * size, *axes] if size > 1 else axes


def _moved(weights: Weights, direction: Weights, step: float) -> Weights:
    # Rounded, so that a point reached along two ways is one candidate.
    return tuple(round(w + step * d, 6) for w, d in zip(weights, direction, strict=True))


def best_candidate(candidates: Sequence[Candidate]) -> Candidate:
    """Returns the candidate with the lowest score, the earliest of equals."""
    return min(candidates, key=lambda candidate: candidate.score)
