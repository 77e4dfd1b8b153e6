"""The report: what the rows say, as one JSON object, figures and MLflow metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from deme_core.artifacts import ArtifactRef
from deme_core.binned_losses import RelativeLosses
from deme_core.digests import canonical_json, sha256_bytes
from deme_core.errors import DemeError
from deme_core.figures import save_heldout_losses, save_loss_curves, save_sample_comparison
from deme_core.metrics import higher_is_better, metric_name
from deme_core.verdict import (
    RowScores,
    Verdict,
    compare,
    differences,
    differing_conditions,
    interval,
    paired_difference,
)
from tasks.experts import Expert, relative_heldout_losses, spread_weights
from tasks.jobs import JobResult
from tasks.prefect_artifacts import show_report, show_scores
from tasks.registry import register, registration_tags
from tasks.runtime import Runtime, current_runtime

Rows = Mapping[str, Sequence[JobResult]]


@task(name="report", cache_policy=NO_CACHE)
def write_report(
    rows: Rows,
    trainings: Mapping[str, JobResult],
    losses: Mapping[str, JobResult],
    expert_losses: Sequence[JobResult],
    experts: Sequence[Expert],
    merged: JobResult,
    scale: float,
    searches: Mapping[str, Mapping[str, Any]],
    flow_run_id: str,
) -> dict[str, Any]:
    """Compares the rows, draws the figures, logs both, and returns what ``deme run --json`` prints."""
    runtime = current_runtime()
    scores = _scores(rows)
    primary = metric_name(runtime.recipe.evaluate.metrics[0], runtime.recipe.evaluate.extractor_name)
    deciding = _deciding(rows, primary)
    verdict = {f"vs_{row}": _verdict(deciding, row, primary) for row in ("pretrained", "finetuned")}
    conditions = shared_conditions(rows, runtime.recipe.evaluate.seeds)
    report = {
        "recipe": runtime.recipe.name,
        "flow_run_id": flow_run_id,
        "mlflow_run_id": runtime.tracker.run_id,
        "fingerprint": fingerprint(conditions),
        "conditions": conditions,
        "metric": primary,
        "rows": {row: _intervals(by_metric) for row, by_metric in scores.items()},
        "scores": scores,
        "verdict": verdict,
        "gain": {
            f"vs_{row}": {m: asdict(paired_difference(scores["merged"][m], scores[row][m])) for m in scores["merged"]}
            for row in ("pretrained", "finetuned")
        },
        "gain_by": {
            f"vs_{row}": {k: asdict(v) for k, v in differences(deciding["merged"], deciding[row]).items()}
            for row in ("pretrained", "finetuned")
        },
        "merged": {
            "uri": merged.ref.uri,
            "digest": merged.ref.digest,
            "weights": spread_weights(experts, merged.metrics["weights"]),
            "weights_digest": merged.metrics["weights_digest"],
        },
        "finetuned": {"scale": scale},
        "experts": [expert.to_dict() for expert in experts],
        "heldout_loss": {row: result.metrics["mean"] for row, result in losses.items()},
        "search": {what: _search_summary(metrics) for what, metrics in searches.items()},
        "num_images": runtime.recipe.evaluate.num_images,
        "seeds": list(runtime.recipe.evaluate.seeds),
    }
    _track(runtime, report, primary)
    source = runtime.artifacts.folder_uri(merged.ref)
    registration = register(runtime.settings, report, deciding["merged"], source=source, metric=primary)
    report["registry"] = asdict(registration)
    runtime.tracker.set_tags(runtime.tracker.run_id, registration_tags(registration))
    relative = relative_heldout_losses(runtime, losses, expert_losses, experts)
    report["figures"] = _draw(runtime, rows, trainings, relative)
    report["seconds"] = runtime.timing.seconds()
    _log_report(runtime, report, deciding)
    show_report(report, runtime.tracker)
    return report


@task(name="score", cache_policy=NO_CACHE)
def write_score(model: str, results: Sequence[JobResult], flow_run_id: str) -> dict[str, Any]:
    """Logs and returns the scores of one model."""
    runtime = current_runtime()
    rows = {"model": results}
    conditions = shared_conditions(rows, runtime.recipe.evaluate.seeds)
    scores = _scores(rows)["model"]
    primary = metric_name(runtime.recipe.evaluate.metrics[0], runtime.recipe.evaluate.extractor_name)
    report = {
        "recipe": runtime.recipe.name,
        "model": model,
        "flow_run_id": flow_run_id,
        "mlflow_run_id": runtime.tracker.run_id,
        "fingerprint": fingerprint(conditions),
        "conditions": conditions,
        "metric": primary,
        "rows": {"model": _intervals(scores)},
        "scores": {"model": scores},
        "num_images": runtime.recipe.evaluate.num_images,
        "seeds": list(runtime.recipe.evaluate.seeds),
        "seconds": runtime.timing.seconds(),
    }
    means = {f"{metric}/model": bounds["mean"] for metric, bounds in _intervals(scores).items()}
    runtime.tracker.log_metrics(runtime.tracker.run_id, means)
    tags = {"deme.model": model, "deme.fingerprint": report["fingerprint"], "deme.flow_run_id": flow_run_id}
    runtime.tracker.set_tags(runtime.tracker.run_id, tags)
    _log_report(runtime, report, _deciding(rows, primary))
    show_scores(report, runtime.tracker)
    return report


def _verdict(deciding: Mapping[str, RowScores], row: str, primary: str) -> Verdict:
    return compare(deciding["merged"], deciding[row], higher_is_better=higher_is_better(primary))


def _deciding(rows: Rows, primary: str) -> dict[str, RowScores]:
    """Returns what each row scored by the metric that decides."""
    return {
        row: RowScores(
            [result.metrics["scores"][primary] for result in results],
            [result.metrics["replicates"] for result in results],
        )
        for row, results in rows.items()
    }


def _log_report(runtime: Runtime, report: dict[str, Any], deciding: Mapping[str, RowScores]) -> None:
    """Logs the report with the replicates, which a later comparison of runs needs and nobody reads."""
    content = {**report, "replicates": {row: scores.replicates for row, scores in deciding.items()}}
    runtime.tracker.log_text(runtime.tracker.run_id, canonical_json(content), "report.json")


def _intervals(scores: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {metric: asdict(interval(values)) for metric, values in scores.items()}


def _scores(rows: Rows) -> dict[str, dict[str, list[float]]]:
    """Returns the scores of each row, by metric, one per seed."""
    return {
        row: {metric: [r.metrics["scores"][metric] for r in results] for metric in results[0].metrics["scores"]}
        for row, results in rows.items()
    }


def shared_conditions(rows: Rows, seeds: Sequence[int]) -> dict[str, Any]:
    """Returns all that the scores of all rows share.

    Raises:
        DemeError: rows were evaluated under different conditions; names those that differ.
    """
    conditions = [result.metrics["conditions"] for results in rows.values() for result in results]
    first = conditions[0]
    different = sorted({name for other in conditions for name in differing_conditions(first, other)})
    if different:
        raise DemeError(f"The rows cannot be compared: they differ in {', '.join(different)}.")
    return {**first, "seeds": list(seeds)}


def fingerprint(conditions: Mapping[str, Any]) -> str:
    """Returns the digest of evaluation conditions: only scores with the same one can be compared."""
    return sha256_bytes(canonical_json(conditions).encode())


def _track(runtime: Runtime, report: dict[str, Any], primary: str) -> None:
    metrics = {}
    for row, by_metric in report["rows"].items():
        for metric, bounds in by_metric.items():
            metrics[f"{metric}/{row}"] = bounds["mean"]
            # Under a name of their own, so that MLflow's charts show the means first.
            metrics[f"{metric}_interval/{row}_low"] = bounds["low"]
            metrics[f"{metric}_interval/{row}_high"] = bounds["high"]
    for metric in report["rows"]["merged"]:
        # Positive when merging helped.
        sign = 1.0 if higher_is_better(metric) else -1.0
        metrics[f"{metric}/gain"] = sign * report["gain"]["vs_pretrained"][metric]["mean"]
        metrics[f"{metric}/gain_over_finetuned"] = sign * report["gain"]["vs_finetuned"][metric]["mean"]
    metrics |= {f"heldout_loss/{row}": loss for row, loss in report["heldout_loss"].items()}
    run_id = runtime.tracker.run_id
    runtime.tracker.log_metrics(run_id, metrics)
    runtime.tracker.set_tags(
        run_id,
        {
            "deme.primary_metric": primary,
            "deme.fingerprint": report["fingerprint"],
            "deme.verdict.vs_pretrained": report["verdict"]["vs_pretrained"],
            "deme.verdict.vs_finetuned": report["verdict"]["vs_finetuned"],
            "deme.merged.uri": report["merged"]["uri"],
            "deme.merged.digest": report["merged"]["digest"],
            "deme.merged.weights": report["merged"]["weights"],
            "deme.finetuned.scale": report["finetuned"]["scale"],
        },
    )


def _search_summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a search cost, and how well its proxies ranked what was scored in full."""
    kept = ("score", "num_images", "num_losses", "rank_correlation")
    return {"num_candidates": len(metrics["candidates"]), **{name: metrics[name] for name in kept}}


def _draw(
    runtime: Runtime, rows: Rows, trainings: Mapping[str, JobResult], relative: Mapping[str, RelativeLosses]
) -> dict[str, str]:
    """Draws the figures into DEME_HOME/reports/<MLflow run> and MLflow; returns their paths."""
    folder = runtime.settings.state_folder / "reports" / runtime.tracker.run_id
    folder.mkdir(parents=True, exist_ok=True)
    seed = rows["merged"][0].metrics["seed"]
    grids = {row: _fetch_grid(runtime, results[0].ref) for row, results in rows.items()}
    names = ("samples", "losses", "heldout_loss")
    figures = {name: folder / f"{name}.png" for name in names}
    save_heldout_losses(relative, figures["heldout_loss"])
    save_sample_comparison(grids, figures["samples"], title=f"{runtime.recipe.name}, same initial noise (seed {seed})")
    save_loss_curves({name: result.metrics["history"] for name, result in trainings.items()}, figures["losses"])
    for path in figures.values():
        runtime.tracker.log_file(runtime.tracker.run_id, path)
    runtime.tracker.log_image(runtime.tracker.run_id, figures["samples"], "samples")
    return {name: str(path) for name, path in figures.items()}


def _fetch_grid(runtime: Runtime, ref: ArtifactRef) -> Path:
    return runtime.artifacts.fetch(ref) / "samples.png"
