"""What a search is made of: weights, batches of them, and their scores."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Weights = tuple[float, ...]
Kind = Literal["full", "rough", "loss"]

# Yields weights that may be scored at once and in any order, and is sent their scores in the order it gave. How many
# it yields together is its own decision: a result must not depend on how many workers there are.
Strategy = Generator[list[Weights], Sequence[float], None]

A = TypeVar("A")
B = TypeVar("B")
R = TypeVar("R")


@dataclass(frozen=True)
class Batch:
    """Weights that may be scored at once.

    Attributes:
        kind: what is asked for: the full score, a rough one of few sampling steps, or a loss that needs no image.
        weights: what to score.
    """

    kind: Kind
    weights: tuple[Weights, ...]


Search = Generator[Batch, Sequence[float], None]


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


def scored_candidates(search: Search, score: Callable[[Batch], Iterable[float]]) -> Iterator[Candidate]:
    """Yields the candidates of ``search`` in its order, each as soon as it and all before it are scored.

    Args:
        search: proposes batches.
        score: gives the scores of a batch in its order; an iterator, if they shall be seen as they come.
    """
    batch = next(search, None)
    while batch is not None:
        scores = []
        for weights, value in zip(batch.weights, score(batch), strict=True):
            scores.append(value)
            if batch.kind != "loss":
                yield Candidate(weights, value, rough=batch.kind == "rough")
        try:
            batch = search.send(scores)
        except StopIteration:
            return


def translated(
    inner: Generator[A, Sequence[float], R], translate: Callable[[A], B]
) -> Generator[B, Sequence[float], R]:
    """Yields what ``inner`` yields, translated, hands it the scores that come back, and returns what it returns."""
    try:
        batch = next(inner)
        while True:
            batch = inner.send((yield translate(batch)))
    except StopIteration as finished:
        return finished.value
