from collections.abc import Callable

from deme_core.search import Weights


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
