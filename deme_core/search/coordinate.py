"""One weight at a time around the best so far."""

from collections.abc import Iterator

from deme_core.search.candidates import Candidate, Objective, Weights


def coordinate_search(
    objective: Objective,
    start: Weights,
    *,
    step_size: float,
    max_candidates: int,
    min_step_size: float = 0.02,
    lowest: float = float("-inf"),
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
        lowest: no weight goes below it.
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
                moved = _moved(best, direction, sign * step_size, lowest)
                while moved != best:
                    yield from score(moved)
                    if scored.get(moved, float("inf")) >= scored[best]:
                        break
                    best, improved = moved, True
                    moved = _moved(best, direction, sign * step_size, lowest)
        if not improved:
            step_size /= 2


def _directions(size: int) -> list[Weights]:
    axes = [tuple(float(i == axis) for i in range(size)) for axis in range(size)]
    return [(1.0,) * size, *axes] if size > 1 else axes


def _moved(weights: Weights, direction: Weights, step: float, lowest: float) -> Weights:
    # Rounded, so that a point reached along two ways is one candidate.
    return tuple(round(max(w + step * d, lowest) if d else w, 6) for w, d in zip(weights, direction, strict=True))
