"""How a run confines its copies before they are merged, where the recipe asks for RegMean."""

from typing import Any

from deme_core.manifest import ArtifactRef
from deme_core.recipe import Recipe
from tasks.experts import Expert
from tasks.jobs import ConfineJob, GramsJob
from tasks.stages import confine, measure_inputs


def confined_copies(recipe: Recipe, pretrained: ArtifactRef, experts: tuple[Expert, ...]) -> tuple[ArtifactRef, ...]:
    """Returns the copies that are merged, each confined to the inputs of its own segment."""
    spec = recipe.merge.regmean
    measured: list[Any] = [
        measure_inputs.submit(
            GramsJob(
                expert=expert.ref,
                dataset=recipe.dataset,
                low=expert.segment.low,
                high=expert.segment.high,
                spec=spec,
            ),
            str(expert.segment),
        )
        for expert in experts
    ]
    grams = tuple(future.result().ref for future in measured)
    confined: list[Any] = [
        confine.submit(
            ConfineJob(pretrained=pretrained, expert=expert.ref, grams=grams, index=index, spec=spec),
            str(expert.segment),
        )
        for index, expert in enumerate(experts)
    ]
    return tuple(future.result().ref for future in confined)
