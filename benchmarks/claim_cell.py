"""A cell of the claim's laboratory: one training seed under one setting, with a row for each way to merge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.laboratory import Laboratory
from deme_core.manifest import ArtifactRef
from deme_core.recipe import MethodSpec, Recipe, SearchSpec
from deme_core.search import from_natural_weights
from deme_core.verdict import RowScores

# Ways to merge, by row. Each is what it changes in the recipe's search, and its method; None is fixed natural weights,
# which are 1 for RegMean and 1/N otherwise.
MERGES: dict[str, tuple[dict[str, Any] | None, MethodSpec]] = {
    "uniform": (None, MethodSpec()),
    "grid": ({"strategy": "grid"}, MethodSpec()),
    "coordinate": ({"strategy": "coordinate"}, MethodSpec()),
    "quadratic": ({"strategy": "quadratic"}, MethodSpec()),
    "tpe": ({"strategy": "tpe"}, MethodSpec()),
    "cma_es": ({"strategy": "cma_es"}, MethodSpec()),
    "gp": ({"strategy": "gp"}, MethodSpec()),
    "cma_es, narrow": ({"strategy": "cma_es"}, MethodSpec()),
    "block_weights": ({}, MethodSpec(method="block_weights")),
    "ties": ({}, MethodSpec(method="ties")),
    "dare": ({}, MethodSpec(method="dare")),
    "regmean": (None, MethodSpec(method="regmean")),
    "regmean, searched": ({}, MethodSpec(method="regmean")),
}
# Around 1/N, as RegMean's search is around 1.
_NARROW = {"cma_es, narrow"}
# One change each of the recipe's settings, the optimizer steps of all copies together left as they are.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "p=0": ("finetune.global_sampling_probability=0",),
    "p=0.7": ("finetune.global_sampling_probability=0.7",),
    "lambda=0": ("finetune.consistency_weight=0",),
    "lambda=1": ("finetune.consistency_weight=1",),
    "projection": ("finetune.channel_projection=true",),
    "no projection": ("finetune.channel_projection=false",),
    "replay=pretrained": ("finetune.replay=pretrained",),
    "constant rate": ("finetune.lr_scheduler=constant",),
    "N=2": ("segments.count=2",),
    "N=8": ("segments.count=8",),
}


@dataclass(frozen=True)
class Cell:
    """What one training seed gave under one setting.

    Attributes:
        metric: name of the metric that decides.
        scores: of each row, under each sampling seed; with resamples if the metric decides.
        weights: merge weights of each row that has some; the control's is its scale.
        heldout: held-out loss of each row that is one model.
        loss_changes: held-out loss of each row in each segment, relative to the pretrained model's there, less 1; the
            ensemble's are the experts', each on its own segment. The mean over all timesteps is that of the lowest
            ones nearly alone, where losses are a hundred times as high.
        others: the recipe's other metrics of the same images, each with its scores alone.
    """

    metric: str
    scores: Mapping[str, RowScores]
    weights: Mapping[str, Sequence[float]]
    heldout: Mapping[str, float]
    loss_changes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    others: Sequence["Cell"] = ()


def ablation_overrides(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Returns the settings of an ablation; with another N, each copy takes so many steps that all take as many."""
    changed = ABLATIONS[name]
    if name.startswith("N="):
        in_all = recipe.finetune.num_steps * recipe.segments.num_segments
        changed = (*changed, "segments.edges=null", f"finetune.num_steps={in_all // int(name[2:])}")
    return changed


def run_cell(recipe: Recipe, merges: Sequence[str], *, soup: bool = False, **laboratory_settings: Any) -> Cell:
    """Does what a cell needs and the store does not have.

    Args:
        recipe: the setting.
        merges: ways to merge, of `MERGES`.
        soup: also N copies of all timesteps, merged by weights that the same search found (Wortsman et al. 2022,
            arXiv 2203.05482): the number of directions without the segments.
        laboratory_settings: see `Laboratory`.
    """
    laboratory = Laboratory(recipe, **laboratory_settings)
    rows, weights = _models(laboratory, merges)
    if soup:
        assert recipe.merge.search is not None
        copies = laboratory.soup()
        search = _shared_range(recipe.merge.search, len(copies))
        weights["soup"] = laboratory.found_weights(copies, search, MethodSpec())["weights"]
        rows["soup"] = laboratory.merged(copies, weights["soup"])
    experts = laboratory.experts()
    found = {row: laboratory.scores_by_metric((model,)) for row, model in rows.items()}
    found["ensemble"] = laboratory.scores_by_metric(experts, laboratory.edges)
    changes = {row: laboratory.loss_changes(model) for row, model in rows.items()}
    changes["ensemble"] = [laboratory.loss_changes(expert)[index] for index, expert in enumerate(experts)]
    deciding, *others = found["pretrained"]
    return Cell(
        metric=deciding,
        scores={row: scores[deciding] for row, scores in found.items()},
        weights=weights,
        heldout={row: laboratory.mean_heldout(model) for row, model in rows.items()},
        loss_changes=changes,
        others=[Cell(metric, {row: scores[metric] for row, scores in found.items()}, {}, {}) for metric in others],
    )


def _shared_range(search: SearchSpec, num_copies: int) -> SearchSpec:
    """Returns the search with the range of one weight shared by all: the steps of copies add up."""
    shared = {"max_weight": search.max_weight / num_copies, "min_weight": search.min_weight / num_copies}
    return search.model_copy(update=shared)


def _models(laboratory: Laboratory, merges: Sequence[str]) -> tuple[dict[str, ArtifactRef], dict[str, list[float]]]:
    """Returns the model of each row, and the weights it was made with."""
    recipe, experts, control = laboratory.recipe, laboratory.experts(), laboratory.control()
    search = recipe.merge.search
    if search is None:
        raise ValueError("the claim is about searched weights: give merge.search")
    scale = laboratory.found_weights((control,), search, MethodSpec(), is_control=True)["weights"]
    weights: dict[str, list[float]] = {"finetuned": scale}
    rows = {"pretrained": laboratory.pretrained.ref, "finetuned": laboratory.merged((control,), scale)}
    for name in merges:
        changed, method = MERGES[name]
        among = from_natural_weights(_shared_range(search, len(experts)) if name in _NARROW else search, method)
        row, merged, natural = f"merged, {name}", experts, 1.0 / len(experts)
        if method.method == "regmean":  # What is merged then, by task arithmetic, is confined copies.
            merged, natural, method = laboratory.confined(experts, method.regmean), 1.0, MethodSpec()
        if changed is None:
            weights[row] = [natural] * len(experts)
        else:
            weights[row] = laboratory.found_weights(merged, among.model_copy(update=changed), method)["weights"]
        rows[row] = laboratory.merged(merged, weights[row], method)
    if recipe.distill is not None:
        rows["distilled"] = laboratory.distilled(rows[f"merged, {merges[0]}"], experts, recipe.distill)
    return rows, weights
