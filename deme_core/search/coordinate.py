"""One weight at a time around the best so far."""

from collections.abc import Sequence

from deme_core.search.candidates import Strategy, Weights


def coordinate_search(
    start: Weights,
    *,
    others: Sequence[Weights] = (),
    step_size: float,
    max_candidates: int,
    min_step_size: float = 0.02,
    lowest: float = float("-inf"),
    highest: float = float("inf"),
) -> Strategy:
    """Yields a pattern search (Hooke and Jeeves 1961) from ``start``, both ways of a direction at once.

    Moves along the common scale of all weights first and then along each weight, keeps every improvement, goes on in
    a direction that helped, and halves the step when none helps. The best candidate so far, the pretrained model
    included, is always the place it searches around.

    Args:
        start: the first weights after all zeros.
        others: scored with them; the search goes on from the best.
        step_size: first step.
        max_candidates: score at most so many, the pretrained model included.
        min_step_size: give up below this step.
        lowest: no weight goes below it.
        highest: no weight goes beyond it; from a start beyond it the search begins there.
    """
    scored: dict[Weights, float] = {}
    start = tuple(min(weight, highest) for weight in start)
    # What has more places than a move leaves, and may be come back to.
    given = {tuple(round(weight, 6) for weight in weights): weights for weights in (start, *others)}

    def moved_from(weights: Weights, direction: Weights, step: float) -> Weights:
        # Rounded, so that a point reached along two ways is one candidate.
        moved = tuple(
            round(min(max(w + step * d, lowest), highest) if d else w, 6)
            for w, d in zip(weights, direction, strict=True)
        )
        return given.get(moved, moved)

    def score(*wanted: Weights) -> Strategy:
        new = [weights for weights in dict.fromkeys(wanted) if weights not in scored][: max_candidates - len(scored)]
        if new:
            scored.update(zip(new, (yield new), strict=True))

    def value(weights: Weights) -> float:
        return scored.get(weights, float("inf"))

    yield from score((0.0,) * len(start), start, *others)
    best = min(scored, key=scored.__getitem__)
    while step_size >= min_step_size and len(scored) < max_candidates:
        improved = False
        for direction in _directions(len(start)):
            up, down = (moved_from(best, direction, step) for step in (step_size, -step_size))
            yield from score(up, down)
            moved, step = (up, step_size) if value(up) <= value(down) else (down, -step_size)
            while value(moved) < scored[best]:
                best, improved = moved, True
                moved = moved_from(best, direction, step)
                yield from score(moved)
        if not improved:
            step_size /= 2


def _directions(size: int) -> list[Weights]:
    axes = [tuple(float(i == axis) for i in range(size)) for axis in range(size)]
    return [(1.0,) * size, *axes] if size > 1 else axes
