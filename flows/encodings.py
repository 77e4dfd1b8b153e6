"""How a flow has the data set encoded before anything is trained on it: in slices, many tasks at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefect.futures import PrefectFuture

from deme_core.errors import RecipeError
from deme_core.manifest import ArtifactRef
from deme_core.recipe import Recipe
from deme_core.slices import ENCODED_AT_ONCE, slice_size
from tasks.jobs import EmbeddingsJob, JobResult, LatentsJob
from tasks.stages import encode

_JOBS: dict[str, type[LatentsJob] | type[EmbeddingsJob]] = {"latents": LatentsJob, "embeddings": EmbeddingsJob}


@dataclass(frozen=True)
class EncodedDataset:
    """The data set encoded, slice by slice; nothing where trainings encode it themselves.

    Attributes:
        latents: of all images.
        embeddings: of all distinct captions.
    """

    latents: tuple[ArtifactRef, ...] = ()
    embeddings: tuple[ArtifactRef, ...] = ()


def encode_dataset(recipe: Recipe, pretrained: JobResult) -> EncodedDataset:
    """Has images and captions encoded, unless the model is on pixels or the recipe says otherwise; waits for it.

    Raises:
        RecipeError: it asks for latents of a model on pixels.
    """
    stages = pretrained.metrics.get("caches", [])  # Models stored before there was a cache are on pixels.
    dataset = recipe.dataset
    if dataset.cache_latents and not stages:
        raise RecipeError("dataset.cache_latents is for models on latents, and this one is on pixels; leave it out.")
    return _encoded(recipe, pretrained.ref, stages if dataset.is_encoded else [])


def _encoded(recipe: Recipe, pretrained: ArtifactRef, stages: Sequence[str]) -> EncodedDataset:
    step = slice_size(recipe.execution.images_per_task, ENCODED_AT_ONCE)

    def submit(stage: str, low: int) -> PrefectFuture[JobResult]:
        return encode.submit(_JOBS[stage](pretrained=pretrained, dataset=recipe.dataset, low=low, high=low + step))

    futures = {stage: [submit(stage, 0)] for stage in stages}
    for stage, (first,) in futures.items():
        num_rows = first.result().metrics["num_in_all"]
        futures[stage] += [submit(stage, low) for low in range(step, num_rows, step)]
    return EncodedDataset(**{stage: tuple(future.result().ref for future in each) for stage, each in futures.items()})
