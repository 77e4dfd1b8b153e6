"""A fit of the held-out loss: O(N²) losses, then a handful of full scores along one line.

Near theta_0 the loss is close to quadratic in the merge weights, so a parabola through a few points tells in which
direction it falls. How far to go is left to the full score, for a lower loss is no better picture by itself.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from deme_core.search.candidates import Candidate, Objective, Weights
from deme_core.search.coordinate import coordinate_search

Proxy = Callable[[Weights], float]


def design(num_weights: int, step: float) -> list[Weights]:
    """Returns the (N + 1)(N + 2) / 2 points that determine a quadratic: 0, h e_i, 2h e_i and h (e_i + e_j)."""
    axes = np.eye(num_weights) * step
    points = [np.zeros(num_weights), *axes, *(2 * axes)]
    points += [axes[i] + axes[j] for i, j in itertools.combinations(range(num_weights), 2)]
    return [tuple(float(value) for value in point) for point in points]


def fit_minimum(proxy: Proxy, *, num_weights: int, step: float, max_weight: float) -> Weights:
    """Returns the minimum of the quadratic through the design's losses, within [0, max_weight].

    Args:
        proxy: a cheap loss; lower is better.
        num_weights: N.
        step: h, the distance of the design's points.
        max_weight: bound of every weight.
    """
    from scipy.optimize import minimize

    points = design(num_weights, step)
    rows = np.array([_monomials(np.asarray(point)) for point in points])
    coefficients = np.linalg.solve(rows, np.array([proxy(point) for point in points]))
    start = np.full(num_weights, min(step, max_weight))
    found = minimize(
        lambda weights: float(_monomials(weights) @ coefficients), start, bounds=[(0.0, max_weight)] * num_weights
    )
    return tuple(round(float(weight), 4) for weight in found.x)


def _monomials(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns 1, w_i and w_i w_j for i <= j."""
    pairs = itertools.combinations_with_replacement(range(len(weights)), 2)
    return np.array([1.0, *weights, *(weights[i] * weights[j] for i, j in pairs)])


def quadratic_search(
    objective: Objective, proxy: Proxy, *, num_weights: int, step: float, max_weight: float, max_candidates: int
) -> Iterator[Candidate]:
    """Yields the pretrained model, the minimum of the fit, and a pattern search along the line through both.

    Args:
        objective: the full score.
        proxy: the loss that is fitted.
        num_weights: N.
        step: distance of the points of the fit.
        max_weight: bound of every weight of the fit.
        max_candidates: full scores at the most.
    """
    direction = fit_minimum(proxy, num_weights=num_weights, step=step, max_weight=max_weight)
    if not any(direction):  # The loss rises whichever way: only the line of equal weights is left to try.
        direction = (1.0 / num_weights,) * num_weights

    def on_line(scale: Weights) -> Weights:
        return tuple(round(scale[0] * weight, 6) for weight in direction)

    for candidate in coordinate_search(
        lambda scale: objective(on_line(scale)),
        (1.0,),
        step_size=0.5,
        max_candidates=max_candidates,
        min_step_size=0.1,
        lowest=0.0,
    ):
        yield Candidate(on_line(candidate.weights), candidate.score)
