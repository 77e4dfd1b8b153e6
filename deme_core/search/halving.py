"""Successive halving (Jamieson and Talwalkar 2016) in two rounds: all candidates roughly, the best of them in full."""

import math

from deme_core.search.candidates import Batch, Search, Strategy, Weights


def halve(strategy: Strategy, *, survivors: float) -> Search:
    """Yields what ``strategy`` proposes for rough scores, then the survivors for full ones, all at once.

    The pretrained model always survives: a search must be able to find that nothing helps.

    Args:
        strategy: searches by rough scores; the pretrained model is its first candidate.
        survivors: share of the candidates that are scored in full, at least two.
    """
    seen: dict[Weights, float] = {}
    try:
        batch = next(strategy)
        while True:
            scores = yield Batch("rough", tuple(batch))
            seen.update(zip(batch, scores, strict=True))
            batch = strategy.send(scores)
    except StopIteration:
        pass
    num_survivors = max(2, math.ceil(survivors * len(seen)))
    best = sorted(sorted(seen, key=seen.__getitem__)[:num_survivors])
    yield Batch("full", tuple(dict.fromkeys([next(iter(seen)), *best])))
