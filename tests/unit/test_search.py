import contextlib
import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deme_core.recipe import MethodSpec, SearchSpec
from deme_core.search import (
    Candidate,
    Weights,
    best_candidate,
    from_natural_weights,
    max_candidates,
    search_weights,
)
from deme_core.search.coordinate import coordinate_search
from deme_core.search.grid import control_values, grid_search
from tests.counted import candidates_of, quadratic, search


@pytest.mark.parametrize("num_weights", [1, 2, 3])
@pytest.mark.parametrize("values", [(0.0, 0.25, 0.5), (0.25, 0.5), (0.5, 0.25, 0.5), (1.0,)])
def test_a_grid_visits_all_combinations_once_and_the_pretrained_model_first(
    values: tuple[float, ...], num_weights: int
) -> None:
    objective = quadratic((0.3,) * num_weights)
    candidates = list(candidates_of(grid_search(values, num_weights=num_weights), objective))

    visited = [candidate.weights for candidate in candidates]
    zero = (0.0,) * num_weights
    assert visited == objective.asked
    assert visited[0] == zero
    assert len(set(visited)) == len(visited)
    assert set(visited) == {zero, *itertools.product(values, repeat=num_weights)}
    assert all(candidate.score == objective.function(candidate.weights) for candidate in candidates)


@pytest.mark.parametrize(
    ("optimum", "coupling"),
    [
        ((0.4,), 0.0),
        ((0.0,), 0.0),
        ((2.3,), 0.0),
        ((-0.6,), 0.0),
        ((0.1, 0.5), 0.0),
        ((0.1, 0.5), 3.0),
        ((0.1, 0.1, 0.2, 0.5), 0.0),
        ((0.1, 0.1, 0.2, 0.5), 2.0),
        ((0.0, 0.0, 0.0), 0.0),
        ((1.3, 1.3, 1.3), 0.0),
    ],
)
def test_a_coordinate_search_finds_the_optimum_of_a_quadratic(optimum: Weights, coupling: float) -> None:
    num_weights = len(optimum)
    candidates = list(
        candidates_of(
            coordinate_search((1 / num_weights,) * num_weights, step_size=0.25, max_candidates=2000),
            quadratic(optimum, coupling=coupling),
        )
    )
    best = best_candidate(candidates).weights
    # No step of 1/32, the last above 0.02, along an axis lowers the objective any more.
    assert best == pytest.approx(optimum, abs=(1 + coupling) / 64)


bounds = st.floats(-3, 3, allow_nan=False).map(lambda value: round(value, 3))


@given(st.data())
def test_a_coordinate_search_is_frugal_whatever_it_finds(data: st.DataObject) -> None:
    num_weights = data.draw(st.integers(1, 4))
    point = st.tuples(*[bounds] * num_weights)
    start, limit = data.draw(point), data.draw(st.integers(1, 60))
    objective = quadratic(data.draw(point), coupling=data.draw(st.floats(0, 4)))

    candidates = list(candidates_of(coordinate_search(start, step_size=0.25, max_candidates=limit), objective))

    visited = [candidate.weights for candidate in candidates]
    assert visited == objective.asked
    assert len(visited) <= limit
    assert len(set(visited)) == len(visited)
    assert visited[0] == (0.0,) * num_weights
    assert limit == 1 or start in visited
    assert best_candidate(candidates).score <= objective.function((0.0,) * num_weights)


@pytest.mark.parametrize(
    "objective", [lambda w: 1.0, lambda w: math.inf, lambda w: -sum(w), lambda w: sum(w)], ids=["flat", "inf", "↓", "↑"]
)
@pytest.mark.parametrize("num_weights", [1, 3])
def test_a_coordinate_search_ends_on_any_objective(objective: Callable[[Weights], float], num_weights: int) -> None:
    strategy = coordinate_search((0.5,) * num_weights, step_size=0.25, max_candidates=100)
    assert 2 <= len(list(candidates_of(strategy, objective))) <= 100


def test_a_coordinate_search_goes_on_in_a_direction_that_helps() -> None:
    strategy = coordinate_search((0.5,), step_size=0.25, max_candidates=9)
    found = [candidate.weights for candidate in candidates_of(strategy, quadratic((2.0,)))]
    assert found == [(0.0,), (0.5,), (0.75,), (0.25,), *((1.0 + 0.25 * i,) for i in range(5))]


def test_both_ways_of_a_direction_are_one_batch() -> None:
    strategy = coordinate_search((0.5, 0.5), step_size=0.25, max_candidates=9)
    assert next(strategy) == [(0.0, 0.0), (0.5, 0.5)]
    assert strategy.send([1.0, 0.5]) == [(0.75, 0.75), (0.25, 0.25)]
    assert strategy.send([1.0, 0.4]) == [(0.5, 0.25), (0.0, 0.25)], "around the best, and never again what is known"


def test_a_coordinate_search_tries_the_common_scale_first() -> None:
    strategy = coordinate_search((0.5, 0.5), step_size=0.25, max_candidates=5)
    found = [candidate.weights for candidate in candidates_of(strategy, quadratic((9.0, 9.0)))]
    assert found == [(0.0, 0.0), (0.5, 0.5), (0.75, 0.75), (0.25, 0.25), (1.0, 1.0)]


def test_a_point_reached_along_two_ways_is_one_candidate() -> None:
    strategy = coordinate_search((0.1, 0.1), step_size=0.1, max_candidates=50)
    visited = [candidate.weights for candidate in candidates_of(strategy, quadratic((0.3, 0.4), coupling=1.0))]
    assert all(weight == round(weight, 6) for weights in visited for weight in weights)


def test_a_start_worse_than_the_pretrained_model_is_left() -> None:
    strategy = coordinate_search((1.0, 1.0), step_size=0.1, max_candidates=30)
    assert best_candidate(list(candidates_of(strategy, quadratic((0.0, 0.1))))).weights == pytest.approx(
        (0.0, 0.1), abs=1e-6
    )


def test_candidates_are_yielded_as_they_are_scored() -> None:
    objective = quadratic((0.2, 0.4))
    strategy = coordinate_search((0.5, 0.5), step_size=0.25, max_candidates=20)
    for count, candidate in enumerate(candidates_of(strategy, objective), 1):
        assert len(objective.asked) == count
        assert objective.asked[-1] == candidate.weights


def test_the_controls_scales_reach_as_far_as_all_segments_together() -> None:
    assert control_values((0.0, 0.25, 0.5), 4) == (0.0, 0.25, 0.5, 1.0, 2.0)
    assert control_values((0.1,), 3) == pytest.approx((0.1, 0.3, 1.0))
    assert control_values((0.5, 0.5), 1) == (0.5, 1.0)


@pytest.mark.parametrize("num_weights", [1, 2])
@pytest.mark.parametrize(
    "spec", [SearchSpec(strategy="grid"), SearchSpec(max_candidates=9)], ids=["grid", "coordinate"]
)
def test_a_search_keeps_to_its_announced_number_of_candidates(spec: SearchSpec, num_weights: int) -> None:
    candidates = list(search(quadratic((0.33,) * num_weights), spec, num_weights=num_weights, num_segments=2))
    limit = max_candidates(spec, num_weights=num_weights, num_segments=2)
    assert len(candidates) == limit if spec.strategy == "grid" else len(candidates) <= limit == 9
    assert candidates[0].weights == (0.0,) * num_weights


def test_a_grid_offers_the_control_more_scales() -> None:
    spec = SearchSpec(strategy="grid", values=(0.0, 0.25))
    control = search(quadratic((0.5,)), spec, num_weights=1, num_segments=4, is_control=True)
    merged = search(quadratic((0.5, 0.5)), spec, num_weights=2, num_segments=4)
    assert {candidate.weights for candidate in control} == {(0.0,), (0.25,), (1.0,)}
    assert {candidate.weights for candidate in merged} == set(itertools.product((0.0, 0.25), repeat=2))


@pytest.mark.parametrize(
    ("initial_weight", "num_weights", "start"),
    [(None, 4, (0.25,) * 4), (0.7, 4, (0.7,) * 4), (None, 1, (1.0,)), (0.7, 1, (1.0,))],
)
def test_a_coordinate_search_starts_where_the_recipe_says_and_the_control_at_one(
    initial_weight: float | None, num_weights: int, start: Weights
) -> None:
    spec = SearchSpec(initial_weight=initial_weight)
    objective = quadratic((0.5,) * num_weights)
    found = search(objective, spec, num_weights=num_weights, num_segments=4, is_control=num_weights == 1)
    assert [next(found).weights for _ in range(2)] == [(0.0,) * num_weights, start]


def test_the_only_expert_that_was_kept_is_no_control() -> None:
    found = search(quadratic((0.5,)), SearchSpec(initial_weight=0.7), num_weights=1, num_segments=4)
    assert [next(found).weights for _ in range(2)] == [(0.0,), (0.7,)]


def test_a_single_segment_starts_where_the_recipe_says_too() -> None:
    found = search(quadratic((0.5,)), SearchSpec(initial_weight=0.7), num_weights=1, num_segments=1)
    assert [next(found).weights for _ in range(2)] == [(0.0,), (0.7,)]


@pytest.mark.parametrize("num_copies", [1, 2])
def test_a_weight_per_block_starts_where_one_per_copy_does(num_copies: int) -> None:
    # Of two segments: with one copy the gate has dropped the other. A copy has three blocks.
    num_weights, start = 3 * num_copies, (1 / num_copies,) * (3 * num_copies)
    counts = {"num_weights": num_weights, "num_copies": num_copies, "num_segments": 2}
    coordinate = search(quadratic((0.5,) * num_weights), SearchSpec(), **counts)
    assert [next(coordinate).weights for _ in range(2)] == [(0.0,) * num_weights, start]
    fit = next(search_weights(SearchSpec(strategy="quadratic"), **counts))
    assert max(fit.weights[1]) == start[0], "the step of the fit"


def test_weights_start_at_one_where_that_is_natural_and_nothing_else_was_asked_for() -> None:
    for method, start in [("regmean", 1.0), ("ties", 1.0), ("task_arithmetic", None), ("block_weights", None)]:
        spec = MethodSpec.model_validate({"method": method})
        assert from_natural_weights(SearchSpec(), spec).initial_weight == start
        assert from_natural_weights(SearchSpec(initial_weight=0.3), spec).initial_weight == 0.3


def test_the_best_candidate_is_the_earliest_of_the_lowest() -> None:
    candidates = [Candidate((0.0,), 2.0), Candidate((0.5,), 1.0), Candidate((1.0,), 1.0)]
    assert best_candidate(candidates) is candidates[1]


@pytest.mark.parametrize("strategy", ["grid", "coordinate", "quadratic", "tpe", "cma_es", "gp"])
def test_every_strategy_proposes_several_candidates_at_once(strategy: str) -> None:
    spec = SearchSpec.model_validate({"strategy": strategy, "max_candidates": 12})
    batches = search_weights(spec, num_weights=2, num_copies=2, num_segments=2)
    batch, sizes = next(batches), list[int]()
    with contextlib.suppress(StopIteration):
        while True:
            sizes.append(len(batch.weights))
            batch = batches.send([sum((w - 0.4) ** 2 for w in weights) for weights in batch.weights])
    assert max(sizes) >= 2
    assert sum(sizes) / len(sizes) > 1.5
