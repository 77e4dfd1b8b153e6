"""The searches that need a proxy, Optuna, or two rounds."""

import itertools
import math
from typing import Literal, get_args

import pytest

from deme_core.recipe import SearchSpec
from deme_core.search import STRATEGIES, Weights, best_candidate, max_candidates
from deme_core.search.candidates import Strategy
from deme_core.search.halving import halve
from deme_core.search.optuna_search import _farthest, optuna_search
from deme_core.search.quadratic import fit_minimum
from tests.counted import Counted, Objective, candidates_of, quadratic, search


def minimum_of(proxy: Objective, *, num_weights: int, step: float, max_weight: float) -> Weights:
    fit = fit_minimum(num_weights=num_weights, step=step, max_weight=max_weight)
    losses = [proxy(point) for point in next(fit)]
    with pytest.raises(StopIteration) as finished:
        fit.send(losses)
    found: Weights = finished.value.value
    return found


def bowl(optimum: Weights, coupling: float = 0.3) -> Counted:
    return quadratic(optimum, coupling=coupling)


@pytest.mark.parametrize("optimum", [(0.4,), (0.1, 0.5), (0.1, 0.1, 0.2, 0.5)])
def test_a_fit_of_a_quadratic_finds_its_minimum_in_as_many_losses_as_it_has_coefficients(optimum: Weights) -> None:
    proxy = bowl(optimum)
    found = minimum_of(proxy, num_weights=len(optimum), step=0.5, max_weight=2.0)
    assert found == pytest.approx(optimum, abs=2e-3)
    n = len(optimum)
    assert len(proxy.asked) == (n + 1) * (n + 2) // 2


def test_a_fit_stays_within_its_bounds() -> None:
    found = minimum_of(bowl((3.0, -1.0), 0.0), num_weights=2, step=0.5, max_weight=2.0)
    assert found == pytest.approx((2.0, 0.0), abs=1e-3)


@pytest.mark.parametrize("curvature", [(1e-4, 1e-4), (1e-5, 1e-4), (1e-5, 1e-2)])
def test_a_fit_of_losses_that_hardly_differ_finds_their_minimum(curvature: Weights) -> None:
    """Merges change a loss, relative to the pretrained model's, by a thousandth or less."""

    def loss(weights: Weights) -> float:
        return 1.0 + sum(c * (w - o) ** 2 for c, w, o in zip(curvature, weights, (0.9, 0.3), strict=True))

    assert minimum_of(loss, num_weights=2, step=0.25, max_weight=2.0) == pytest.approx((0.9, 0.3), abs=2e-4)


@pytest.mark.parametrize("ridge", [0.4, 1.6])
def test_of_a_saddle_the_lowest_place_within_the_bounds_is_found(ridge: float) -> None:
    # Downhill from the start is the nearer bound of the second weight; the farther one is lower.
    def loss(weights: Weights) -> float:
        return 1.0 + 1e-3 * ((weights[0] - 0.5) ** 2 - (weights[1] - ridge) ** 2)

    found = minimum_of(loss, num_weights=2, step=0.25 if ridge < 1 else 1.75, max_weight=2.0)
    assert found == pytest.approx((0.5, 2.0 if ridge < 1 else 0.0), abs=1e-3)


def test_a_flat_loss_leaves_a_fit_where_it_starts() -> None:
    assert minimum_of(lambda _: 1.0, num_weights=2, step=0.5, max_weight=2.0) == (0.5, 0.5)


def test_the_full_score_decides_how_far_along_the_fit_to_go() -> None:
    # The proxy's minimum points the right way and goes twice too far.
    proxy, objective = bowl((0.4, 0.8), 0.0), bowl((0.2, 0.4), 0.0)
    spec = SearchSpec(strategy="quadratic", max_candidates=12)
    found = list(search(objective, spec, num_weights=2, num_segments=2, proxy=proxy))
    assert found[0].weights == (0.0, 0.0)
    assert found[1].weights == pytest.approx((0.4, 0.8), abs=2e-3)
    assert best_candidate(found).weights == pytest.approx((0.2, 0.4), abs=0.05)
    assert len(objective.asked) <= 12


def test_a_proxy_that_rises_everywhere_leaves_the_line_of_equal_weights() -> None:
    spec = SearchSpec(strategy="quadratic", max_candidates=8)
    found = list(search(bowl((0.5, 0.5)), spec, num_weights=2, num_segments=2, proxy=bowl((-1.0, -1.0))))
    assert found[1].weights == (0.5, 0.5)
    blocks = search(bowl((0.5,) * 4), spec, num_weights=4, num_copies=2, num_segments=2, proxy=bowl((-1.0,) * 4))
    assert [next(blocks).weights for _ in range(2)] == [(0.0,) * 4, (0.5,) * 4]


@pytest.mark.parametrize("minimum", [0.0004, 0.005, 0.02])
def test_a_minimum_next_to_the_pretrained_model_leaves_the_line_of_equal_weights(minimum: float) -> None:
    """Steps of its own length would take the whole budget to nowhere."""
    spec = SearchSpec(strategy="quadratic", max_candidates=16)
    proxy = bowl((minimum,) * 4)
    found = list(search(bowl((0.3,) * 4), spec, num_weights=4, num_segments=4, proxy=proxy))
    assert best_candidate(found).weights == pytest.approx((0.3,) * 4, abs=0.05)


def test_no_way_leads_back_beyond_the_pretrained_model() -> None:
    spec = SearchSpec(strategy="quadratic", max_candidates=12)
    found = search(bowl((-0.5, -0.5)), spec, num_weights=2, num_segments=2, proxy=bowl((0.5, 0.5)))
    candidates = list(found)
    assert best_candidate(candidates).weights == (0.0, 0.0)
    assert all(weight >= 0 for candidate in candidates for weight in candidate.weights)


@pytest.mark.parametrize("strategy", ["tpe", "cma_es", "gp"])
@pytest.mark.parametrize("num_weights", [1, 3])
def test_optuna_starts_from_the_fit_and_repeats_itself(strategy: str, num_weights: int) -> None:
    optimum = (0.6,) * num_weights
    spec = SearchSpec.model_validate({"strategy": strategy, "max_candidates": 16, "max_weight": 1.5})

    def run() -> list[Weights]:
        found = search(bowl(optimum), spec, num_weights=num_weights, num_segments=3, proxy=bowl(optimum))
        return [candidate.weights for candidate in found]

    weights = run()
    assert weights[0] == (0.0,) * num_weights
    assert weights[1] == pytest.approx(optimum, abs=5e-3)
    assert len(weights) == 16
    assert all(0 <= w <= 1.5 for candidate in weights for w in candidate)
    assert run() == weights


@pytest.mark.parametrize("strategy", ["grid", "coordinate", "quadratic", "tpe", "cma_es", "gp"])
@pytest.mark.parametrize("num_weights", [1, 3])
@pytest.mark.parametrize("few_steps", [None, 5])
def test_no_candidate_comes_twice_and_optunas_take_the_whole_budget(
    strategy: str, num_weights: int, few_steps: int | None
) -> None:
    # Bounds and the start are no numbers of four places, the fit's minimum is.
    settings = {"max_candidates": 14, "max_weight": 2 / 3, "min_weight": -1 / 3, "initial_weight": 1 / 3}
    spec = SearchSpec.model_validate({"strategy": strategy, "few_steps": few_steps, "survivors": 0.5, **settings})
    objective, proxy = bowl((1 / 3,) * num_weights), bowl((1 / 3,) * num_weights)
    found = list(
        search(objective, spec, num_weights=num_weights, num_segments=3, proxy=proxy, rough=bowl((0.3,) * num_weights))
    )
    tried = [c.weights for c in found if c.rough == bool(few_steps)]
    assert len({tuple(round(weight, 4) for weight in weights) for weights in tried}) == len(tried)
    if strategy in ("tpe", "cma_es", "gp"):
        assert len(tried) == 14
        assert few_steps is None or len(found) - 14 in (7, 8), "half of them, and the pretrained model"
        assert all(-1 / 3 <= weight <= 2 / 3 for weights in tried for weight in weights)


def test_a_process_that_has_found_the_controls_scale_goes_on_where_nothing_was_measured() -> None:
    def score(weights: Weights) -> float:
        return 250 + 20 * (weights[0] - 0.3) ** 2 + 0.3 * math.sin(37 * weights[0])

    spec = SearchSpec(strategy="gp", max_candidates=24)
    found = search(score, spec, num_weights=1, num_segments=4, is_control=True, proxy=bowl((1.0,)))
    tried = sorted(candidate.weights[0] for candidate in found)
    assert len(set(tried)) == 24
    assert max(right - left for left, right in itertools.pairwise(tried)) < 0.3


def test_the_place_of_a_repeat_is_far_from_all_candidates_and_within_the_bounds() -> None:
    assert _farthest([(0.0,), (0.8,), (2.0,)], low=0.0, high=2.0) == pytest.approx((1.4,), abs=0.01)
    place = _farthest([(0.0,), (0.1,)], low=0.0, high=1 / 3)
    assert place[0] <= 1 / 3
    assert place == pytest.approx((1 / 3,), abs=0.01)


@pytest.mark.parametrize("strategy", ["coordinate", "tpe", "cma_es", "gp"])
def test_what_an_earlier_search_found_is_scored_first_and_searched_around(strategy: str) -> None:
    known = {"known_weights": [[1.4, 0.1, 0.9], [0.2, 0.2, 0.2]], "known_scales": [1.6]}
    spec = SearchSpec.model_validate({"strategy": strategy, "max_candidates": 12, **known})
    objective, proxy = bowl((1.5, 0.2, 1.0)), bowl((0.0, 0.0, 0.0))
    found = list(search(objective, spec, num_weights=3, num_segments=3, proxy=proxy))
    assert [c.weights for c in found[:3]] == [(0.0,) * 3, *spec.known_weights]
    assert len(found) == 12
    best = best_candidate(found)
    assert best.score <= objective((1.4, 0.1, 0.9)) < found[0].score
    without = SearchSpec.model_validate({"strategy": strategy, "max_candidates": 12})
    assert (
        best.score < best_candidate(list(search(objective, without, num_weights=3, num_segments=3, proxy=proxy))).score
    )

    control = search(bowl((1.7,)), spec, num_weights=1, num_segments=3, is_control=True, proxy=bowl((1.0,)))
    assert [next(control).weights for _ in range(2)] == [(0.0,), (1.6,)]


@pytest.mark.parametrize("strategy", ["quadratic", "tpe", "cma_es", "gp"])
def test_no_weight_is_tried_or_measured_beyond_its_bound(strategy: str) -> None:
    spec = SearchSpec.model_validate({"strategy": strategy, "max_candidates": 16, "max_weight": 0.6})
    proxy, objective = bowl((0.4, 0.5)), bowl((3.0, 3.0), 0.0)
    assert len(list(search(objective, spec, num_weights=2, num_segments=2, proxy=proxy))) > 3
    assert all(0 <= weight <= 0.6 for weights in proxy.asked + objective.asked for weight in weights)
    assert max(max(weights) for weights in objective.asked) > 0.55


@pytest.mark.parametrize("strategy", ["tpe", "cma_es", "gp"])
def test_a_lower_bound_below_zero_lets_a_copy_be_subtracted_and_is_kept(strategy: str) -> None:
    spec = SearchSpec.model_validate({"strategy": strategy, "max_candidates": 24, "min_weight": -0.4})
    proxy, objective = bowl((0.4, 0.2)), bowl((0.6, -0.8), 0.0)
    found = list(search(objective, spec, num_weights=2, num_segments=2, proxy=proxy))
    assert all(-0.4 <= weight <= 2.0 for weights in objective.asked for weight in weights)
    assert best_candidate(found).weights[1] < -0.1


@pytest.mark.parametrize("strategy", ["grid", "coordinate", "quadratic", "tpe", "cma_es", "gp"])
def test_the_control_can_keep_and_double_what_it_learnt_whatever_bounds_the_segments(strategy: str) -> None:
    spec = SearchSpec.model_validate({"strategy": strategy, "max_candidates": 16, "max_weight": 0.5})
    found = list(search(bowl((1.8,)), spec, num_weights=1, num_segments=4, is_control=True, proxy=bowl((1.0,))))
    assert (1.0,) in [candidate.weights for candidate in found]
    assert best_candidate(found).weights[0] > 1.4


@pytest.mark.parametrize("strategy", ["grid", "coordinate", "quadratic", "tpe", "cma_es", "gp"])
def test_a_search_goes_around_what_cannot_be_measured(strategy: str) -> None:
    def measured(weights: Weights) -> float:
        return float("inf") if sum(weights) > 0.9 else bowl((0.3, 0.4))(weights)

    values = (0.0, 0.3, 0.4, 2.0)
    spec = SearchSpec.model_validate({"strategy": strategy, "max_candidates": 30, "values": values})
    found = list(search(measured, spec, num_weights=2, num_segments=2, proxy=measured))
    assert any(candidate.score == float("inf") for candidate in found) or strategy == "quadratic"
    assert best_candidate(found).score < 0.3 * found[0].score


def test_cma_es_gets_near_a_minimum_without_any_proxy() -> None:
    strategy = optuna_search("cma_es", num_weights=2, starts=[(0.5, 0.5)], max_weight=1.0, max_candidates=80)
    found = list(candidates_of(strategy, bowl((0.2, 0.8))))
    assert best_candidate(found).weights == pytest.approx((0.2, 0.8), abs=0.1)


def test_a_gaussian_process_finds_a_minimum_in_fewer_scores_than_the_others() -> None:
    def found(sampler: Literal["tpe", "cma_es", "gp"]) -> float:
        strategy = optuna_search(sampler, num_weights=4, starts=[(0.5,) * 4], max_weight=2.0, max_candidates=20)
        return best_candidate(list(candidates_of(strategy, bowl((0.3, 1.3, 0.7, 0.8))))).score

    assert found("gp") < 0.5 * min(found("tpe"), found("cma_es"))


def test_a_gaussian_process_is_not_misled_by_candidates_that_are_far_too_bad() -> None:
    # As merges are: a cliff around a narrow valley, a dozen times as high as the valley is deep.
    def cliff(weights: Weights) -> float:
        distance = sum((w - o) ** 2 for w, o in zip(weights, (-0.5, 1.4, 0.2), strict=True))
        return 1.2 + 0.15 * distance + math.expm1(min(distance, 8.0) / 2)

    starts = [(0.4, 1.0, 0.5), (1.0,) * 3]
    strategy = optuna_search("gp", num_weights=3, starts=starts, min_weight=-1.0, max_weight=2.0, max_candidates=12)
    assert best_candidate(list(candidates_of(strategy, cliff))).score < 1.3


def test_of_many_rough_candidates_the_best_and_the_pretrained_model_are_scored_in_full() -> None:
    spec = SearchSpec(strategy="grid", values=(0.0, 0.25, 0.5, 0.75, 1.0), few_steps=5, survivors=0.2)
    rough, full = bowl((0.5,)), bowl((0.75,))
    found = list(search(full, spec, num_weights=1, num_segments=1, rough=rough))
    assert [c.rough for c in found] == [True] * 5 + [False] * (len(found) - 5)
    assert full.asked[0] == (0.0,)
    assert (0.5,) in full.asked
    assert len(full.asked) <= 3
    assert not best_candidate(found).rough
    assert len(found) <= max_candidates(spec, num_weights=1, num_segments=1)


def test_the_named_share_of_the_candidates_is_scored_in_full() -> None:
    def ten() -> Strategy:
        yield [(float(number),) for number in range(10)]

    halving = halve(ten(), survivors=0.5)
    next(halving)
    best_last = [10.0 - number for number in range(10)]
    assert halving.send(best_last).weights == ((0.0,), (5.0,), (6.0,), (7.0,), (8.0,), (9.0,))


def test_a_recipe_names_the_strategies_of_the_registry() -> None:
    assert get_args(SearchSpec.model_fields["strategy"].annotation) == tuple(STRATEGIES)
