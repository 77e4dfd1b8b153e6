"""Search for merge weights: which candidates are scored, in which order (METHOD section 2).

A search knows no images: it is given an objective, lower being better, and proposes weights. All w = 0, the
pretrained model, is always the first candidate, so that a search can only lose to it by chance.
"""

import math
from collections.abc import Iterator

from deme_core.recipe import SearchSpec
from deme_core.search.candidates import Candidate, Objective, Weights, best_candidate
from deme_core.search.coordinate import coordinate_search
from deme_core.search.grid import control_values, grid_search
from deme_core.search.halving import halve
from deme_core.search.optuna_search import optuna_search
from deme_core.search.quadratic import Proxy, fit_minimum, quadratic_search

__all__ = ["Candidate", "Objective", "Proxy", "Weights", "best_candidate", "max_candidates", "search_weights"]


def search_weights(
    objective: Objective,
    spec: SearchSpec,
    *,
    num_weights: int,
    num_segments: int,
    is_control: bool = False,
    proxy: Proxy | None = None,
    rough: Objective | None = None,
) -> Iterator[Candidate]:
    """Yields every candidate as it is scored; the result is `best_candidate`.

    Args:
        objective: the full score of weights.
        spec: the strategy and its settings.
        num_weights: N, or 1 for the control, whose single weight scales its task vector.
        num_segments: N; the control took N times the steps of a segment.
        is_control: search the control's scale, which starts at 1.
        proxy: a cheap loss of weights; needed by ``quadratic``, and warm-starts ``tpe`` and ``cma_es``. Others never
            ask for it.
        rough: a rough score of weights; given, all candidates get it, and the survivors alone the full one.
    """
    candidates = _strategy(rough or objective, spec, num_weights, num_segments, is_control, proxy)
    return candidates if rough is None else halve(candidates, objective, survivors=spec.survivors)


def _strategy(
    objective: Objective,
    spec: SearchSpec,
    num_weights: int,
    num_segments: int,
    is_control: bool,
    proxy: Proxy | None,
) -> Iterator[Candidate]:
    start = 1.0 if is_control else spec.initial_weight if spec.initial_weight is not None else 1.0 / num_weights
    match spec.strategy:
        case "grid":
            values = control_values(spec.values, num_segments) if is_control else spec.values
            return grid_search(objective, values, num_weights=num_weights)
        case "coordinate":
            return coordinate_search(
                objective, (start,) * num_weights, step_size=spec.step_size, max_candidates=spec.max_candidates
            )
        case "quadratic":
            assert proxy is not None
            return quadratic_search(
                objective,
                proxy,
                num_weights=num_weights,
                step=start,
                max_weight=spec.max_weight,
                max_candidates=spec.max_candidates,
            )
        case "tpe" | "cma_es":
            starts = [(start,) * num_weights]
            if proxy is not None:
                fitted = fit_minimum(proxy, num_weights=num_weights, step=start, max_weight=spec.max_weight)
                starts.insert(0, fitted)
            return optuna_search(
                objective,
                spec.strategy,
                num_weights=num_weights,
                starts=starts,
                max_weight=spec.max_weight,
                max_candidates=spec.max_candidates,
            )


def max_candidates(spec: SearchSpec, *, num_weights: int, num_segments: int, is_control: bool = False) -> int:
    """Returns how many scores, rough and full, a search takes at the most."""
    if spec.strategy == "grid":
        values = control_values(spec.values, num_segments) if is_control else spec.values
        num_all = len(set(values)) ** num_weights + (0.0 not in values)
    else:
        num_all = spec.max_candidates
    if spec.few_steps is None:
        return num_all
    return num_all + max(2, math.ceil(spec.survivors * num_all)) + 1
