"""The registry of search strategies: one file for each, `tpe`, `cma_es` and `gp` being Optuna's."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from deme_core.recipe import SearchSpec
from deme_core.search.candidates import Strategy, Weights
from deme_core.search.coordinate import coordinate_search
from deme_core.search.grid import grid_search
from deme_core.search.optuna_search import optuna_search
from deme_core.search.quadratic import line_search

# Takes the settings and the weights to start from, the best first.
Start = Callable[[SearchSpec, Sequence[Weights]], Strategy]


def _grid(spec: SearchSpec, starts: Sequence[Weights]) -> Strategy:
    return grid_search(spec.values, num_weights=len(starts[0]))


def _coordinate(spec: SearchSpec, starts: Sequence[Weights]) -> Strategy:
    return coordinate_search(starts[0], others=starts[1:], step_size=spec.step_size, max_candidates=spec.max_candidates)


def _quadratic(spec: SearchSpec, starts: Sequence[Weights]) -> Strategy:
    minimum, equal = starts
    return line_search(minimum, equal=equal, max_weight=spec.max_weight, max_candidates=spec.max_candidates)


def _optuna(sampler: Literal["tpe", "cma_es", "gp"], spec: SearchSpec, starts: Sequence[Weights]) -> Strategy:
    return optuna_search(
        sampler,
        num_weights=len(starts[0]),
        starts=starts,
        min_weight=spec.min_weight,
        max_weight=spec.max_weight,
        max_candidates=spec.max_candidates,
    )


STRATEGIES: dict[str, Start] = {
    "grid": _grid,
    "coordinate": _coordinate,
    "quadratic": _quadratic,
    "tpe": partial(_optuna, "tpe"),
    "cma_es": partial(_optuna, "cma_es"),
    "gp": partial(_optuna, "gp"),
}
# Those that start at the minimum of a fit of the held-out loss.
FITTED = frozenset({"quadratic", "tpe", "cma_es", "gp"})
