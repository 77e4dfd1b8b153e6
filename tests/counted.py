from collections.abc import Callable, Iterator

from deme_core.recipe import SearchSpec
from deme_core.search import Batch, Candidate, Kind, Weights, scored_candidates, search_weights
from deme_core.search.candidates import Strategy, translated

Objective = Callable[[Weights], float]


class Counted:
    """An objective that remembers what it was asked."""

    def __init__(self, function: Callable[[Weights], float]) -> None:
        self.function, self.asked = function, list[Weights]()

    def __call__(self, weights: Weights) -> float:
        self.asked.append(weights)
        return self.function(weights)


def quadratic(optimum: Weights, *, curvature: float = 1.0, coupling: float = 0.0) -> Counted:
    def value(weights: Weights) -> float:
        offsets = [w - o for w, o in zip(weights, optimum, strict=True)]
        return curvature * sum(d * d for d in offsets) + coupling * sum(offsets) ** 2

    return Counted(value)


def candidates_of(strategy: Strategy, objective: Objective) -> Iterator[Candidate]:
    """Scores what a strategy proposes, in its order."""
    search = translated(strategy, lambda weights: Batch("full", tuple(weights)))
    return scored_candidates(search, lambda batch: map(objective, batch.weights))


def search(
    objective: Objective,
    spec: SearchSpec,
    *,
    num_weights: int,
    num_segments: int,
    num_copies: int | None = None,
    is_control: bool = False,
    proxy: Objective | None = None,
    rough: Objective | None = None,
) -> Iterator[Candidate]:
    """Runs a whole search on functions in place of models, with a copy for each weight unless told otherwise."""
    functions: dict[Kind, Objective | None] = {"full": objective, "loss": proxy, "rough": rough}

    def score(batch: Batch) -> Iterator[float]:
        function = functions[batch.kind]
        assert function is not None
        return map(function, batch.weights)

    batches = search_weights(
        spec,
        num_weights=num_weights,
        num_copies=num_copies or num_weights,
        num_segments=num_segments,
        is_control=is_control,
    )
    return scored_candidates(batches, score)
