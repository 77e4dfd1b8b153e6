"""Successive halving (Jamieson and Talwalkar 2016) in two rounds: all candidates roughly, the best of them in full."""

import math
from collections.abc import Iterator

from deme_core.search.candidates import Candidate, Objective


def halve(rough: Iterator[Candidate], objective: Objective, *, survivors: float) -> Iterator[Candidate]:
    """Yields every rough candidate, then the survivors with their full scores.

    The pretrained model always survives: a search must be able to find that nothing helps.

    Args:
        rough: a search under a rough objective; the pretrained model is its first candidate.
        objective: the full score.
        survivors: share of the candidates that are scored in full, at least two.
    """
    seen: list[Candidate] = []
    for candidate in rough:
        seen.append(candidate)
        yield Candidate(candidate.weights, candidate.score, rough=True)
    ranked = sorted(dict.fromkeys(c.weights for c in sorted(seen, key=lambda c: c.score)[: _count(seen, survivors)]))
    for weights in dict.fromkeys([seen[0].weights, *ranked]):
        yield Candidate(weights, objective(weights))


def _count(seen: list[Candidate], survivors: float) -> int:
    return max(2, math.ceil(survivors * len(seen)))
