"""Searches by Optuna (Akiba et al. 2019): the tree-structured Parzen estimator, and CMA-ES.

Both are seeded, so that a search that was killed proposes the same weights again; scores that are known already are
taken from the search's log (`deme_core.search.score_log`).
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

from deme_core.search.candidates import Candidate, Objective, Weights


def optuna_search(
    objective: Objective,
    sampler: Literal["tpe", "cma_es"],
    *,
    num_weights: int,
    starts: Sequence[Weights],
    max_weight: float,
    max_candidates: int,
    seed: int = 0,
) -> Iterator[Candidate]:
    """Yields the pretrained model, the ``starts``, and then what the sampler proposes in [0, max_weight]^N.

    Args:
        objective: scores weights.
        sampler: tpe, or cma_es, which needs two weights: a single one is left to tpe.
        num_weights: N.
        starts: weights to begin with, at least one, such as the minimum of a fit.
        max_weight: bound of every weight.
        max_candidates: how many are scored, the pretrained model included.
        seed: of the sampler.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen: optuna.samplers.BaseSampler
    if sampler == "cma_es" and num_weights > 1:
        with warnings.catch_warnings():  # Its arguments for a start are deprecated, without another way to give one.
            warnings.simplefilter("ignore", FutureWarning)
            chosen = optuna.samplers.CmaEsSampler(
                x0={_name(i): weight for i, weight in enumerate(starts[0])},
                sigma0=0.15 * max_weight,
                seed=seed,
                n_startup_trials=0,
                popsize=max(4, num_weights + 2),
            )
    else:
        chosen = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=max(len(starts), num_weights) + 1, multivariate=True
        )
    study = optuna.create_study(sampler=chosen)
    fixed = list(dict.fromkeys([(0.0,) * num_weights, *starts]))[:max_candidates]
    for weights in fixed:
        study.enqueue_trial({_name(i): min(max(weight, 0.0), max_weight) for i, weight in enumerate(weights)})
    for _ in range(max_candidates):
        trial = study.ask()
        weights = tuple(round(trial.suggest_float(_name(i), 0.0, max_weight), 4) for i in range(num_weights))
        score = objective(weights)
        study.tell(trial, score)
        yield Candidate(weights, score)


def _name(index: int) -> str:
    return f"w{index:03d}"
