"""How a run confines its copies before they are merged, where the recipe asks for RegMean."""

from typing import Any

from deme_core.manifest import ArtifactRef
from deme_core.recipe import Recipe
from tasks.experts import Expert
from tasks.jobs import ConfineJob, GramsJob, JobResult
from tasks.progress import Event, tell
from tasks.stages import confine, measure_inputs

# Norms and the like are always averaged; more than this is worth knowing.
_USUAL_SHARE = 0.95


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
    results: list[JobResult] = [future.result() for future in measured]
    if results and (warning := averaged_warning(results[0], spec.max_features)):
        tell(Event("inputs of the copies", "warning", {"message": warning}))
    grams = tuple(result.ref for result in results)
    confined: list[Any] = [
        confine.submit(
            ConfineJob(pretrained=pretrained, expert=expert.ref, grams=grams, index=index, spec=spec),
            str(expert.segment),
        )
        for index, expert in enumerate(experts)
    ]
    return tuple(future.result().ref for future in confined)


def averaged_warning(grams: JobResult, max_features: int) -> str | None:
    """Returns what to tell the user, if much of a copy is merged without being confined.

    Args:
        grams: the matrices of one copy; all copies have the same layers.
        max_features: above which a layer has no matrix.
    """
    share = grams.metrics["share_of_parameters"]
    if share >= _USUAL_SHARE:
        return None
    return (
        f"RegMean confines {share:.0%} of the parameters. The rest is averaged, above all layers of more than "
        f"{max_features:,} features; a larger merge.regmean.max_features confines more, for more memory."
    )
