"""The flow ``deme``: decouple, merge, and compare the four rows."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from deme_core.binned_losses import bin_edges
from deme_core.recipe import Recipe
from deme_core.recipe_file import load_recipe
from deme_core.segments import recipe_segments
from flows.encodings import EncodedDataset, encode_dataset
from flows.evaluation import first_real_features, submit_reference, submit_row
from flows.flow_runtime import flow_runtime
from flows.merge_plan import MergePlan
from flows.parameters import Overrides, RecipeName, recipe_name
from tasks.experts import judge_experts
from tasks.jobs import FinetuneJob, JobResult
from tasks.report import write_report
from tasks.stages import finetune, heldout_loss, obtain_pretrained

ROWS = ("pretrained", "finetuned", "ensemble", "merged")


# Threads only wait for worker processes; how many jobs run at once is the worker pool's to say. The two searches wait
# for tasks of their own in the same threads: there must always be more threads than tasks that do so.
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
    """The picture of DESIGN.md: decouple, judge, search, merge, evaluate, report."""
    pretrained = obtain_pretrained()
    segments = recipe_segments(recipe.segments, pretrained.metrics["num_train_timesteps"])
    edges = (segments[0].low, *(segment.high for segment in segments))
    bins = bin_edges(edges[-1], edges)

    encoded = encode_dataset(recipe, pretrained)
    start = partial(_finetune, recipe, pretrained, encoded)
    control = start((edges[0], edges[-1]), "all timesteps", "finetune/all", len(segments))
    copies = [
        start((segment.low, segment.high), f"segment {i} {segment}", f"finetune/segment-{i}")
        for i, segment in enumerate(segments)
    ]
    losses = {"pretrained": heldout_loss.submit(pretrained.ref, bins, "pretrained")}
    for_report = first_real_features(recipe, "report")
    for_search = first_real_features(recipe, "search") if recipe.merge.search else None

    control_result, *copy_results = _results([control, *copies])
    copy_refs = tuple(copy.ref for copy in copy_results)
    copy_losses = [heldout_loss.submit(ref, bins, f"segment {i}") for i, ref in enumerate(copy_refs)]
    reference = submit_reference(recipe, "report", for_report.result()).result().ref
    search_reference = submit_reference(recipe, "search", for_search.result()) if for_search else None
    rows = {
        "pretrained": submit_row(recipe, "pretrained", (pretrained.ref,), None, reference),
        "ensemble": submit_row(recipe, "ensemble", copy_refs, edges, reference),
    }
    experts = judge_experts(segments, copy_refs, _results(copy_losses), losses["pretrained"].result())

    plan = MergePlan(recipe, pretrained.ref, edges, search_reference.result().ref if search_reference else None)
    weights = plan.find_weights(tuple(expert.ref for expert in experts if expert.merged), "merge weights")
    scale = plan.find_weights((control_result.ref,), "scale of the control", is_control=True)
    merged = plan.merge(tuple(expert.ref for expert in experts if expert.merged), weights, experts, "experts")
    scaled = plan.merge((control_result.ref,), scale, None, "control")
    for row, model in {"merged": merged, "finetuned": scaled}.items():
        rows[row] = submit_row(recipe, row, (model.ref,), None, reference)
        losses[row] = heldout_loss.submit(model.ref, bins, row)

    names = ["all timesteps", *(f"segment {i} {segment}" for i, segment in enumerate(segments))]
    return write_report(
        rows={row: rows[row].result() for row in ROWS},
        trainings=dict(zip(names, [control_result, *copy_results], strict=True)),
        losses={row: future.result() for row, future in losses.items()},
        expert_losses=_results(copy_losses),
        experts=experts,
        merged=merged,
        scale=scaled.metrics["weights"][0],
        searches={what: found.metrics for what, found in plan.searches.items()},
        flow_run_id=str(flow_run.id),
    )


def _finetune(
    recipe: Recipe,
    pretrained: JobResult,
    encoded: EncodedDataset,
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
        latents=encoded.latents,
        embeddings=encoded.embeddings,
    )
    return finetune.submit(job, child_name)


def _results(futures: Sequence[PrefectFuture[JobResult]]) -> list[JobResult]:
    """Waits for all, so that what can be finished is, and then raises the first failure if there is one."""
    for future in futures:
        future.wait()
    return [future.result() for future in futures]
