"""What a search is made of: weights, their scores, and what gives scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Weights = tuple[float, ...]
Objective = Callable[[Weights], float]


@dataclass(frozen=True)
class Candidate:
    """Merge weights and the score they got; lower is better.

    Attributes:
        weights: what was scored.
        score: mean over the search's seeds.
        rough: scored with few sampling steps, to choose who is scored in full; never the result of a search.
    """

    weights: Weights
    score: float
    rough: bool = False


def best_candidate(candidates: Sequence[Candidate]) -> Candidate:
    """Returns the candidate with the lowest full score, the earliest of equals."""
    return min((c for c in candidates if not c.rough), key=lambda candidate: candidate.score)
