"""The flow ``deme``: decouple, merge, and compare the rows."""

from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from deme_core.binned_losses import bin_edges
from deme_core.figures import import_matplotlib
from deme_core.recipe import Recipe
from deme_core.recipe_file import load_recipe
from deme_core.rows import ROWS
from deme_core.segments import recipe_segments
from flows.confinement import confined_copies
from flows.encodings import encode_dataset
from flows.evaluation import first_real_features, submit_reference, submit_row
from flows.flow_runtime import flow_runtime
from flows.merge_plan import MergePlan
from flows.parameters import Overrides, RecipeName, recipe_name
from flows.trainings import Trainings, check_base
from tasks.experts import judge_experts
from tasks.jobs import CheckJob, Demands, JobResult
from tasks.report import write_report
from tasks.run_results import RunResults
from tasks.stages import check_model, heldout_loss, obtain_pretrained

# Threads only wait for worker processes; how many jobs run at once is the worker pool's to say. The two searches wait
# for tasks of their own in the same threads: there must always be more threads than tasks that do so.
_TASK_RUNNER: Any = ThreadPoolTaskRunner(max_workers=256)


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
    """Decouple, judge, search, merge, evaluate, report."""
    obtaining = obtain_pretrained.submit()
    # Beside it: on one GPU what is wrong with them, or with the prompts, would else be told after all trainings.
    for_report = first_real_features(recipe, "report")
    for_search = first_real_features(recipe, "search") if recipe.merge.search else None
    looked_at = [real for real in (for_report, for_search) if real is not None]
    pretrained = _first_result(obtaining, beside=looked_at)
    segments = recipe_segments(recipe.segments, pretrained.metrics["num_train_timesteps"])
    recipe.check_search(pretrained.metrics.get("num_blocks", 1))  # Old artifacts do not say.
    check_model(CheckJob(pretrained=pretrained.ref, demands=Demands.of(recipe)))
    edges = (segments[0].low, *(segment.high for segment in segments))
    bins = bin_edges(edges[-1], edges)

    trainings = Trainings(recipe, pretrained.ref, encode_dataset(recipe, pretrained), segments)
    imported = trainings.imported_copies()  # First: what is wrong with them would else be told after the control.
    control, copies = trainings.control(), imported or trainings.copies()
    losses = {"pretrained": heldout_loss.submit(pretrained.ref, bins, "pretrained")}

    import_matplotlib()  # For the report, beside which nothing else goes on.
    _results(looked_at)
    search_reference = submit_reference(recipe, "search", for_search.result()) if for_search else None
    reference = submit_reference(recipe, "report", for_report.result()).result().ref
    rows = {"pretrained": submit_row(recipe, "pretrained", (pretrained.ref,), None, reference)}

    # The control takes as long as all copies together: what needs them alone does not wait for it.
    copy_results = _results(copies, others=[control])
    check_base(pretrained, copy_results)
    copy_refs = tuple(copy.ref for copy in copy_results)
    copy_losses = [heldout_loss.submit(ref, bins, f"segment {i}") for i, ref in enumerate(copy_refs)]
    rows["ensemble"] = submit_row(recipe, "ensemble", copy_refs, edges, reference)
    experts = judge_experts(segments, copy_refs, _results(copy_losses), losses["pretrained"].result())

    plan = MergePlan(recipe, pretrained.ref, edges, search_reference.result().ref if search_reference else None)
    chosen = tuple(expert for expert in experts if expert.merged)
    refs = tuple(expert.ref for expert in chosen)
    if recipe.merge.method == "regmean":
        refs = confined_copies(recipe, pretrained.ref, chosen)
    weights = plan.find_weights(refs, experts)
    (control_result,) = _results([control])
    check_base(pretrained, [control_result])
    scale = plan.find_scale(control_result.ref)
    merged = plan.merge(refs, experts, weights)
    scaled = plan.scale_control(control_result.ref, scale)
    models = {"pretrained": pretrained, "finetuned": scaled, "merged": merged}
    if recipe.distill:
        models["distilled"] = trainings.distillation(recipe.distill, merged.ref, copy_refs)
    for row in ROWS:
        if row in models and row not in rows:
            rows[row] = submit_row(recipe, row, (models[row].ref,), None, reference)
            losses[row] = heldout_loss.submit(models[row].ref, bins, row)

    names = ["finetuned", *(f"segment {i} {segment}" for i, segment in enumerate(segments))]
    trained = dict(zip(names, [control_result, *copy_results], strict=True))
    if "distilled" in models:
        trained["distilled"] = models["distilled"]
    results = RunResults(
        rows={row: rows[row].result() for row in ROWS if row in rows},
        models=models,
        trainings=trained,
        losses={row: future.result() for row, future in losses.items()},
        expert_losses=_results(copy_losses),
        experts=experts,
        searches={what: found.metrics for what, found in plan.searches.items()},
    )
    return write_report(results, flow_run_id=str(flow_run.id))


def _first_result(future: PrefectFuture[JobResult], beside: Sequence[PrefectFuture[JobResult]]) -> JobResult:
    """Waits for a result, unless something beside it fails first: a pretraining may take days."""
    for each in as_completed([future, *beside]):
        found = each.result()  # Or its failure; the server may not know yet what became of it.
        if each is future:
            return found
    raise AssertionError


def _results(
    futures: Sequence[PrefectFuture[JobResult]], others: Sequence[PrefectFuture[JobResult]] = ()
) -> list[JobResult]:
    """Waits for all, and for the others if one fails: what can be finished is, before the first failure is raised."""
    for future in futures:
        future.wait()
    try:
        return [future.result() for future in futures]
    except Exception:
        for other in others:
            other.wait()
        raise
