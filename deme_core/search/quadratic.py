"""A fit of the held-out loss: O(N²) losses, then a handful of full scores along one line.

Near theta_0 the loss is close to quadratic in the merge weights, so a parabola through a few points tells in which
direction it falls. How far to go is left to the full score, for a lower loss is no better picture by itself.
"""

import itertools
from collections.abc import Generator, Sequence

import numpy as np
import numpy.typing as npt

from deme_core.search.candidates import Strategy, Weights, translated
from deme_core.search.coordinate import coordinate_search


def design(num_weights: int, step: float) -> list[Weights]:
    """Returns the (N + 1)(N + 2) / 2 points that determine a quadratic: 0, h e_i, 2h e_i and h (e_i + e_j)."""
    axes = np.eye(num_weights) * step
    points = [np.zeros(num_weights), *axes, *(2 * axes)]
    points += [axes[i] + axes[j] for i, j in itertools.combinations(range(num_weights), 2)]
    return [tuple(float(value) for value in point) for point in points]


def fit_minimum(
    *, num_weights: int, step: float, max_weight: float, min_weight: float = 0.0
) -> Generator[list[Weights], Sequence[float], Weights]:
    """Yields the design, is sent its losses, and returns the minimum of their quadratic within the bounds.

    Args:
        num_weights: N.
        step: h, the distance of the design's points; less where 2 h would be beyond the bound.
        max_weight: upper bound of every weight.
        min_weight: lower bound of every weight.

    Returns:
        The minimum; where a loss is infinite, and there is no quadratic, the point with the lowest.
    """
    from scipy.optimize import minimize

    points = design(num_weights, min(step, max_weight / 2))
    losses = yield points
    if not np.isfinite(losses).all():
        return points[int(np.argmin(losses))]
    rows = np.array([_monomials(np.asarray(point)) for point in points])
    coefficients = np.linalg.solve(rows, np.array(losses))
    start = np.full(num_weights, min(step, max_weight))
    bounds = [(min_weight, max_weight)] * num_weights
    found = minimize(lambda weights: float(_monomials(weights) @ coefficients), start, bounds=bounds)
    return tuple(round(float(weight), 4) for weight in found.x)


def _monomials(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns 1, w_i and w_i w_j for i <= j."""
    pairs = itertools.combinations_with_replacement(range(len(weights)), 2)
    return np.array([1.0, *weights, *(weights[i] * weights[j] for i, j in pairs)])


def line_search(minimum: Weights, *, max_weight: float, max_candidates: int) -> Strategy:
    """Yields the pretrained model, the minimum of a fit, and a pattern search along the line through both.

    Args:
        minimum: where the fitted loss is lowest; if that is the pretrained model, the line of equal weights is tried.
        max_weight: bound of every weight.
        max_candidates: full scores at the most.
    """
    # The loss rises whichever way: only the line of equal weights is left to try.
    direction = minimum if any(minimum) else (1.0 / len(minimum),) * len(minimum)

    def on_line(scales: list[Weights]) -> list[Weights]:
        return [tuple(round(scale * weight, 6) for weight in direction) for (scale,) in scales]

    search = coordinate_search(
        (1.0,),
        step_size=0.5,
        max_candidates=max_candidates,
        min_step_size=0.1,
        lowest=0.0,
        highest=max_weight / max(direction),
    )
    return translated(search, on_line)
