"""How a flow evaluates: images and real ones become features in slices, many tasks at once, and features scores."""

from typing import Any, Literal

from prefect import allow_failure
from prefect.futures import PrefectFuture

from deme_core.manifest import ArtifactRef
from deme_core.recipe import Recipe
from deme_core.slices import REAL_BATCH_SIZE, slice_size, slices
from tasks.jobs import GeneratedFeaturesJob, GeneratedImages, JobResult, RealFeaturesJob
from tasks.stages import build_reference, evaluate_row, generated_features, real_features

RealPart = Literal["search", "report"]


def submit_row(
    recipe: Recipe, row: str, models: tuple[ArtifactRef, ...], edges: tuple[int, ...] | None, reference: ArtifactRef
) -> PrefectFuture[list[JobResult]]:
    """Submits the generation of a row's images under every seed of the report, and their scores.

    Args:
        recipe: how.
        row: its name.
        models: one model; or the experts, with ``edges``.
        edges: 0, inner edges, T of the experts' segments; None for one model.
        reference: the real images.
    """
    spec = recipe.evaluate
    images = [GeneratedImages(models=models, edges=edges, seed=seed) for seed in spec.seeds]
    ranges = slices(spec.num_images, batch_size=spec.batch_size, images_per_task=recipe.execution.images_per_task)
    features: list[Any] = [  # Futures, which Prefect replaces by their results.
        [
            generated_features.submit(
                row, GeneratedFeaturesJob(label=f"Row {row}", images=image_set, evaluate=spec, low=low, high=high)
            )
            for low, high in ranges
        ]
        for image_set in images
    ]
    return evaluate_row.submit(row, images, allow_failure(features), reference)


def first_real_features(recipe: Recipe, part: RealPart) -> PrefectFuture[JobResult]:
    """Submits the first slice of one part's real images; it also tells how many there are."""
    return real_features.submit(_real_slice(recipe, part, 0))


def submit_reference(recipe: Recipe, part: RealPart, first: JobResult) -> PrefectFuture[JobResult]:
    """Submits the other slices of one part's real images, and the reference made of all.

    Args:
        recipe: how.
        part: which images.
        first: what `first_real_features` gave.
    """
    step = _real_slice_size(recipe)
    starts = range(step, first.metrics["num_in_all"], step)
    others: list[Any] = [real_features.submit(_real_slice(recipe, part, low)) for low in starts]
    return build_reference.submit(part, _num_for_search(recipe), allow_failure([first, *others]))


def _real_slice(recipe: Recipe, part: RealPart, low: int) -> RealFeaturesJob:
    return RealFeaturesJob(
        dataset=recipe.reference_dataset,
        evaluate=recipe.evaluate_for(part),
        part=part,
        num_for_search=_num_for_search(recipe),
        low=low,
        high=low + _real_slice_size(recipe),
    )


def _num_for_search(recipe: Recipe) -> int | None:
    return recipe.merge.search.num_reference_images if recipe.merge.search else 0


def _real_slice_size(recipe: Recipe) -> int:
    return slice_size(recipe.execution.images_per_task, REAL_BATCH_SIZE)
