"""The report: what the rows say, as one JSON object, a page, figures and MLflow metrics."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from deme_core.metrics import higher_is_better, keeps_features
from deme_core.rows import BASELINES
from deme_core.verdict import RowScores, compare, differences, paired_difference
from tasks.experts import relative_heldout_losses, spread_weights
from tasks.jobs import JobResult
from tasks.prefect_artifacts import show_report, show_scores
from tasks.registry import register, registration_tags
from tasks.report_figures import draw_figures, sample_grids
from tasks.report_metrics import log_report, log_run_metrics, log_score_metrics
from tasks.report_page import keep_page, page_of_rows, page_of_run, recipe_file
from tasks.row_scores import (
    Rows,
    both_intervals,
    deciding_scores,
    fingerprint,
    means,
    scores_by_row,
    shared_conditions,
)
from tasks.run_results import RunResults
from tasks.runtime import Runtime, current_runtime


@task(name="report", cache_policy=NO_CACHE)
def write_report(results: RunResults, flow_run_id: str) -> dict[str, Any]:
    """Compares the rows, draws page and figures, logs them, and returns what ``deme run --json`` prints."""
    runtime = current_runtime()
    names = runtime.recipe.evaluate.score_names
    metric = names[0]  # It decides.
    scores, deciding = scores_by_row(results.rows, names), deciding_scores(results.rows, metric)
    report = {
        **_evaluation(runtime, results.rows, scores, deciding, flow_run_id),
        **_comparison(deciding, scores, metric, "merged"),
        **_models(runtime, results),
        "heldout_loss": {row: result.metrics["mean"] for row, result in results.losses.items()},
    }
    if distilled := results.models.get("distilled"):
        report["distilled"] = {
            "uri": runtime.artifacts.folder_uri(distilled.ref),
            "digest": distilled.ref.digest,
            "weights_digest": distilled.metrics["weights_digest"],
            **_comparison(deciding, scores, metric, "distilled"),
        }
    log_run_metrics(runtime, report)
    report["registry"] = _register(runtime, report, results, deciding["merged"])
    relative = relative_heldout_losses(runtime, results.losses, results.expert_losses, results.experts)
    grids = sample_grids(runtime, results.rows)
    report["figures"] = draw_figures(runtime, grids, report["seeds"][0], results.histories, relative)
    report["seconds"] = runtime.timing.seconds()
    content = page_of_run(runtime, report, results, deciding, relative, grids)
    report["page"] = keep_page(runtime, content, report, results.rows)
    log_report(runtime, report, deciding, heldout_change={row: asdict(losses) for row, losses in relative.items()})
    show_report(report, runtime.tracker)
    return report


@task(name="score", cache_policy=NO_CACHE)
def write_score(model: str, results: Sequence[JobResult], flow_run_id: str) -> dict[str, Any]:
    """Logs and returns the scores of one model, and writes their page."""
    runtime = current_runtime()
    names, rows = runtime.recipe.evaluate.score_names, {"model": results}
    scores, deciding = scores_by_row(rows, names), deciding_scores(rows, names[0])
    evaluation = _evaluation(runtime, rows, scores, deciding, flow_run_id)
    report = {**evaluation, "model": model, "seconds": runtime.timing.seconds()}
    log_score_metrics(runtime, report)
    grids = sample_grids(runtime, rows)
    command = f"deme evaluate {shlex.quote(model)} --recipe {recipe_file(runtime)}"
    content = page_of_rows(runtime, report, deciding, grids, title=model, command=command)
    report["page"] = keep_page(runtime, content, report, rows)
    log_report(runtime, report, deciding)
    show_scores(report)
    return report


def _evaluation(
    runtime: Runtime,
    rows: Rows,
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    deciding: Mapping[str, RowScores],
    flow_run_id: str,
) -> dict[str, Any]:
    """Returns what any evaluation reports."""
    spec = runtime.recipe.evaluate
    conditions = shared_conditions(rows, spec.seeds)
    num_real = conditions["reference"]["num_images"]
    return {
        "recipe": runtime.recipe.name,
        "flow_run_id": flow_run_id,
        "mlflow_run_id": runtime.tracker.run_id,
        "fingerprint": fingerprint(conditions),
        "conditions": conditions,
        "metric": spec.score_names[0],
        "rows": {row: means(by_metric) for row, by_metric in scores.items()},
        "intervals": both_intervals(deciding),
        "scores": scores,
        "num_images": spec.num_images,
        "seeds": list(spec.seeds),
        "draws_real_images": spec.metrics[0] != "clip_score" and keeps_features(spec.metrics, num_real),
    }


def _comparison(
    deciding: Mapping[str, RowScores], scores: Mapping[str, Mapping[str, Sequence[float]]], metric: str, ours: str
) -> dict[str, Any]:
    """Returns how the row ``ours`` compares with the pretrained model and with the control."""
    own = scores[ours]
    higher = higher_is_better(metric)
    return {
        "verdict": {f"vs_{row}": compare(deciding[ours], deciding[row], higher_is_better=higher) for row in BASELINES},
        "gain": {f"vs_{row}": {m: asdict(paired_difference(own[m], scores[row][m])) for m in own} for row in BASELINES},
        "gain_by": {
            f"vs_{row}": {k: asdict(v) for k, v in differences(deciding[ours], deciding[row]).items()}
            for row in BASELINES
        },
    }


def _models(runtime: Runtime, results: RunResults) -> dict[str, Any]:
    """Returns the merged model, what it was made of, and how its weights were found."""
    merged = results.models["merged"]
    return {
        "merged": {
            "uri": runtime.artifacts.folder_uri(merged.ref),
            "digest": merged.ref.digest,
            "weights": spread_weights(results.experts, merged.metrics["weights"]),
            "weights_digest": merged.metrics["weights_digest"],
        },
        "finetuned": {"scale": results.scale},
        "experts": [expert.to_dict() for expert in results.experts],
        "search": {what: _search_summary(metrics) for what, metrics in results.searches.items()},
    }


def _search_summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a search cost, and how well its proxies ranked what was scored in full."""
    kept = ("score", "num_images", "num_losses", "rank_correlation")
    return {"num_candidates": len(metrics["candidates"]), **{name: metrics[name] for name in kept}}


def _register(runtime: Runtime, report: dict[str, Any], results: RunResults, scores: RowScores) -> dict[str, Any]:
    """Registers the merged model; returns what became of it."""
    source = runtime.artifacts.folder_uri(results.models["merged"].ref)
    registration = register(runtime.settings, report, scores, source=source, metric=report["metric"])
    runtime.tracker.set_tags(runtime.tracker.run_id, registration_tags(registration))
    return asdict(registration)
