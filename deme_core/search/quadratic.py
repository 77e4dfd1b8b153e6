"""A fit of the held-out loss: O(N²) losses, then a handful of full scores along one line.

Near theta_0 the loss is close to quadratic in the merge weights, so a parabola through a few points tells in which
direction it falls. How far to go is left to the full score, for a lower loss is no better picture by itself.
"""

import itertools
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_core.search.candidates import Strategy, Weights, translated
from deme_core.search.coordinate import coordinate_search

# Of equal weights: a minimum that is no farther away is as good as the pretrained model.
_NEARBY = 0.1

Array = npt.NDArray[np.floating[Any]]


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
    points = design(num_weights, min(step, max_weight / 2))
    losses = np.array((yield points))
    if not np.isfinite(losses).all():
        return points[int(np.argmin(losses))]
    # Merges change a loss by a thousandth or less: as it is, it would look flat to a minimizer, and end the descent.
    spread = float(np.ptp(losses)) or 1.0
    gradient, hessian = _quadratic(np.array(points), (losses - losses[0]) / spread)
    found = _minimum(gradient, hessian, start=min(step, max_weight), low=min_weight, high=max_weight)
    return tuple(round(float(weight), 4) for weight in found)


def _quadratic(points: Array, values: Array) -> tuple[Array, Array]:
    """Returns g (N,) and H (N, N) of the quadratic c + g w + w H w / 2 through ``values`` at the points of a design."""
    first, second = np.triu_indices(points.shape[1])
    rows = np.hstack([np.ones((len(points), 1)), points, points[:, first] * points[:, second]])
    coefficients = np.linalg.solve(rows, values)
    upper = np.zeros((points.shape[1],) * 2)
    upper[first, second] = coefficients[1 + points.shape[1] :]
    return coefficients[1 : 1 + points.shape[1]], upper + upper.T


def _minimum(gradient: Array, hessian: Array, *, start: float, low: float, high: float) -> Array:
    """Returns where g w + w H w / 2 is lowest in [low, high]^N; a saddle's is the lowest that a few starts lead to."""
    from scipy.optimize import minimize

    num_weights = len(gradient)
    starts = [np.full(num_weights, start)]
    if np.linalg.eigvalsh(hessian)[0] < 0:
        axes = np.eye(num_weights)
        corners = [np.zeros(num_weights), np.ones(num_weights), *axes, *(1 - axes)]
        starts += [low + (high - low) * corner for corner in corners]
    best = None
    for begin in starts:
        found = minimize(
            lambda weights: (gradient @ weights + weights @ hessian @ weights / 2, gradient + hessian @ weights),
            begin,
            jac=True,
            bounds=[(low, high)] * num_weights,
            options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000},
        )
        # By more than rounding, so that a flat valley is left where the first start leads to, on any processor.
        if best is None or found.fun < best.fun - 1e-9:
            best = found
    assert best is not None
    minimum: Array = best.x
    return minimum


def line_search(minimum: Weights, *, equal: Weights, max_weight: float, max_candidates: int) -> Strategy:
    """Yields the pretrained model, the minimum of a fit, and a pattern search along the line through both.

    Args:
        minimum: where the fitted loss is lowest.
        equal: equal weights, whose line is tried where that is the pretrained model, or next to it.
        max_weight: bound of every weight.
        max_candidates: full scores at the most.
    """
    # The loss rises whichever way: only the line of equal weights is left to try. So it is where the minimum is a hair
    # away, whose steps would be hairs, too, and take the whole budget to nowhere.
    direction = minimum if max(minimum) > _NEARBY * max(equal) else equal

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
