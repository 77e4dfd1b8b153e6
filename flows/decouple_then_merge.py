"""The flow ``deme``: decouple, merge, and compare the four rows."""

from collections.abc import Sequence
from typing import Any, Literal

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from deme_core.artifacts import ArtifactRef
from deme_core.recipe import Recipe
from deme_core.recipe_file import load_recipe
from deme_core.segments import recipe_segments
from flows.flow_runtime import flow_runtime
from flows.parameters import Overrides, RecipeName, recipe_name
from tasks.jobs import FinetuneJob, JobResult, MergeJob, ReferenceJob, SearchJob
from tasks.report import write_report
from tasks.stages import build_reference, evaluate_row, finetune, merge, obtain_pretrained, search

ROWS = ("pretrained", "finetuned", "ensemble", "merged")


# Threads only wait for worker processes; how many jobs run at once is the worker pool's to say.
_TASK_RUNNER: Any = ThreadPoolTaskRunner(max_workers=64)


@flow(name="deme", flow_run_name=recipe_name, task_runner=_TASK_RUNNER)
def deme(recipe: RecipeName = "digits", overrides: Overrides = ()) -> dict[str, Any]:
    """Finetunes one copy of a pretrained diffusion model per timestep segment and merges the copies.

    Args:
        recipe: name of a recipe, or path or object-store URI of a YAML file.
        overrides: settings such as ``finetune.num_steps=50``.

    Returns:
        The rows with their intervals, the verdict, and where the merged model lies.
    """
    with flow_runtime(load_recipe(recipe, overrides)) as runtime:
        return _compare_rows(runtime.recipe)


def _compare_rows(recipe: Recipe) -> dict[str, Any]:
    """The picture of DESIGN.md: decouple, search, merge, evaluate, report."""
    pretrained = obtain_pretrained()
    segments = recipe_segments(recipe.segments, pretrained.metrics["num_train_timesteps"])
    edges = (segments[0].low, *(segment.high for segment in segments))

    control = _finetune(recipe, pretrained, (edges[0], edges[-1]), "all timesteps", "finetune/all", len(segments))
    experts = [
        _finetune(recipe, pretrained, (segment.low, segment.high), f"segment {i} {segment}", f"finetune/segment-{i}")
        for i, segment in enumerate(segments)
    ]
    for_report = build_reference.submit(reference_job(recipe, "report"))
    for_search = build_reference.submit(reference_job(recipe, "search")) if recipe.merge.search else None

    control_result, *expert_results = _results([control, *experts])
    expert_refs, control_refs = tuple(expert.ref for expert in expert_results), (control_result.ref,)
    weights = _find_weights(recipe, pretrained, expert_refs, len(segments), for_search, "merge weights")
    scale = _find_weights(recipe, pretrained, control_refs, len(segments), for_search, "scale of the control")
    reference = for_report.result().ref
    rows = {
        "pretrained": evaluate_row.submit("pretrained", (pretrained.ref,), None, reference),
        "ensemble": evaluate_row.submit("ensemble", expert_refs, edges, reference),
    }
    merged = _merge(pretrained, expert_refs, weights or recipe.merge.weights, "experts")
    scaled = _merge(pretrained, control_refs, scale or (1.0,), "control")
    rows["merged"] = evaluate_row.submit("merged", (merged.ref,), None, reference)
    rows["finetuned"] = evaluate_row.submit("finetuned", (scaled.ref,), None, reference)

    names = ["all timesteps", *(f"segment {i} {segment}" for i, segment in enumerate(segments))]
    return write_report(
        rows={row: rows[row].result() for row in ROWS},
        trainings=dict(zip(names, [control_result, *expert_results], strict=True)),
        merged=merged,
        scale=scaled.metrics["weights"][0],
        flow_run_id=str(flow_run.id),
    )


def _finetune(
    recipe: Recipe,
    pretrained: JobResult,
    bounds: tuple[int, int],
    label: str,
    child_name: str,
    num_shares: int = 1,
) -> PrefectFuture[JobResult]:
    """Submits the finetuning of one copy, for ``num_shares`` times the steps of a segment."""
    job = FinetuneJob(
        label=label,
        pretrained=pretrained.ref,
        dataset=recipe.dataset,
        finetune=recipe.finetune,
        low=bounds[0],
        high=bounds[1],
        num_steps=recipe.finetune.num_steps * num_shares,
    )
    return finetune.submit(job, child_name)


def _results(futures: Sequence[PrefectFuture[JobResult]]) -> list[JobResult]:
    """Waits for all, so that what can be finished is, and then raises the first failure if there is one."""
    for future in futures:
        future.wait()
    return [future.result() for future in futures]


def reference_job(recipe: Recipe, part: Literal["search", "report"]) -> ReferenceJob:
    """Returns the job that extracts the features of the real images of one part."""
    num_for_search = recipe.merge.search.num_reference_images if recipe.merge.search else 0
    return ReferenceJob(dataset=recipe.dataset, evaluate=recipe.evaluate, part=part, num_for_search=num_for_search)


def _find_weights(
    recipe: Recipe,
    pretrained: JobResult,
    experts: tuple[ArtifactRef, ...],
    num_segments: int,
    reference: PrefectFuture[JobResult] | None,
    what: str,
) -> PrefectFuture[JobResult] | None:
    """Submits the search for weights; None if the recipe fixes them."""
    if recipe.merge.search is None or reference is None:
        return None
    job = SearchJob(
        pretrained=pretrained.ref,
        experts=experts,
        num_segments=num_segments,
        search=recipe.merge.search,
        evaluate=recipe.evaluate,
        reference=reference.result().ref,
    )
    return search.submit(job, what)


def _merge(
    pretrained: JobResult,
    experts: tuple[ArtifactRef, ...],
    weights: PrefectFuture[JobResult] | tuple[float, ...] | None,
    what: str,
) -> JobResult:
    assert weights is not None
    found = weights if isinstance(weights, tuple) else tuple(weights.result().metrics["weights"])
    return merge(MergeJob(pretrained=pretrained.ref, experts=experts, weights=found), what)
