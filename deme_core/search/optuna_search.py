"""Searches by Optuna (Akiba et al. 2019): the tree-structured Parzen estimator, CMA-ES, and a Gaussian process.

All are seeded, asked for a fixed number of candidates at a time, and told the scores in the order of asking: the same
scores lead to the same proposals, whoever measured them and when.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from deme_core.search.candidates import Strategy, Weights

if TYPE_CHECKING:
    import optuna

_SEED = 0
# Few enough that the estimator has learnt something between any two batches of a short search.
_TPE_BATCH_SIZE = 4
# A process learns more from each score, and a batch after the first are guesses about what it does not know yet.
_GP_BATCH_SIZE = 2
# Share of the pretrained model's score by which a candidate may be worse before that counts for less.
_COMPRESSED_BEYOND = 0.1
# Points among which the replacement of a repeat is chosen.
_SAMPLE_SIZE = 1024


def optuna_search(
    sampler: Literal["tpe", "cma_es", "gp"],
    *,
    num_weights: int,
    starts: Sequence[Weights],
    max_weight: float,
    max_candidates: int,
    min_weight: float = 0.0,
) -> Strategy:
    """Yields the pretrained model, the ``starts``, and then what the sampler proposes in [min_weight, max_weight]^N.

    None is yielded twice: a proposal that repeats a candidate gives way to a point that is far from all of them.

    Args:
        sampler: gp, tpe, or cma_es, which needs two weights: a single one is left to tpe.
        num_weights: N.
        starts: weights to begin with, at least one, such as the minimum of a fit.
        max_weight: upper bound of every weight.
        max_candidates: how many are scored, the pretrained model included.
        min_weight: lower bound of every weight, 0 or less.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        # CMA-ES has deprecated its arguments for a start, without another way; TPE calls those it needs experimental.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if sampler == "cma_es" and num_weights > 1:
            batch_size = max(4, num_weights + 2)
            chosen = _cma_es(starts[0], 0.15 * (max_weight - min_weight), population=batch_size)
        elif sampler == "gp":
            batch_size = _GP_BATCH_SIZE
            chosen = _gp(num_startup=len(starts))
        else:
            batch_size = _TPE_BATCH_SIZE
            chosen = _tpe(num_startup=max(len(starts), num_weights) + 1)
    study = optuna.create_study(sampler=chosen)
    space: dict[str, optuna.distributions.BaseDistribution] = {
        _name(i): optuna.distributions.FloatDistribution(min_weight, max_weight) for i in range(num_weights)
    }
    clipped = (tuple(min(max(weight, min_weight), max_weight) for weight in start) for start in starts)
    rounded = partial(_rounded, low=min_weight, high=max_weight)
    distinct: dict[Weights, Weights] = {}
    for weights in [(0.0,) * num_weights, *clipped]:
        distinct.setdefault(rounded(weights), weights)
    first = list(distinct.values())[:max_candidates]
    scores = yield first
    # A process that had to explain how bad the worst are would see no difference between the good ones.
    told = partial(_compressed, of_pretrained=scores[0]) if sampler == "gp" else float

    def add(candidates: Iterable[Weights]) -> None:
        # Added, not asked for: CMA-ES would count them as members of a generation, which it did not draw.
        for weights in candidates:
            params, score = dict(zip(space, weights, strict=True)), known[rounded(weights)]
            study.add_trial(optuna.create_trial(params=params, distributions=space, value=told(score)))

    known = dict(zip(map(rounded, first), scores, strict=True))
    add(first)
    for begin in range(len(first), max_candidates, batch_size):
        with warnings.catch_warnings():
            # A process takes what could not be measured for as bad as the worst that could, as a search means it.
            warnings.filterwarnings("ignore", "Clip non-finite values", UserWarning)
            trials = [study.ask(space) for _ in range(min(batch_size, max_candidates - begin))]
        asked = [rounded(trial.params[name] for name in space) for trial in trials]
        batch: list[Weights] = []
        for weights in asked:
            taken = [*known, *batch]
            batch.append(_farthest(taken, low=min_weight, high=max_weight) if weights in taken else weights)
        scores = yield batch
        known |= zip(batch, scores, strict=True)
        for trial, weights in zip(trials, asked, strict=True):
            study.tell(trial, told(known[weights]))
        add(weights for weights in batch if weights not in asked)


def _rounded(weights: Iterable[float], *, low: float, high: float) -> Weights:
    """Returns weights as candidates have them: to four places, not beyond a bound by that, and without -0."""
    return tuple(min(max(round(weight, 4) + 0.0, low), high) for weight in weights)


def _farthest(candidates: Sequence[Weights], *, low: float, high: float) -> Weights:
    """Returns a point that is far from all candidates: the farthest of a sample, seeded by their number.

    It stands in for a repeat, by which a sampler says that it expects nothing better anywhere. Where that may be wrong
    is where nothing was measured.
    """
    from scipy.spatial.distance import cdist

    shape = _SAMPLE_SIZE, len(candidates[0])
    points = np.random.default_rng([_SEED, len(candidates)]).uniform(low, high, shape)
    farthest = cdist(points, np.array(candidates)).min(axis=1).argmax()
    return _rounded(points[farthest].tolist(), low=low, high=high)


def _cma_es(start: Weights, sigma: float, *, population: int) -> "optuna.samplers.BaseSampler":
    import optuna

    return optuna.samplers.CmaEsSampler(
        x0={_name(i): weight for i, weight in enumerate(start)},
        sigma0=sigma,
        seed=_SEED,
        n_startup_trials=0,
        popsize=population,
    )


def _tpe(*, num_startup: int) -> "optuna.samplers.BaseSampler":
    import optuna

    # Constant liar: what is asked for and not yet told counts as bad, so that a batch is not four times one point.
    return optuna.samplers.TPESampler(seed=_SEED, n_startup_trials=num_startup, multivariate=True, constant_liar=True)


def _gp(*, num_startup: int) -> "optuna.samplers.BaseSampler":
    import optuna

    # Not without noise: candidates share theirs, so that scores are smooth in the weights, but not without bumps.
    return optuna.samplers.GPSampler(seed=_SEED, n_startup_trials=num_startup)


def _compressed(score: float, *, of_pretrained: float) -> float:
    """Returns the score, where it is worse than the pretrained model's as if it rose like a logarithm from there."""
    if score <= of_pretrained or not math.isfinite(of_pretrained):
        return score
    scale = abs(of_pretrained) * _COMPRESSED_BEYOND or 1.0
    return of_pretrained + scale * math.log1p((score - of_pretrained) / scale)


def _name(index: int) -> str:
    return f"w{index:03d}"
