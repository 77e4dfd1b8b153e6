"""What MLflow is told of a report: the numbers that let runs be compared at a glance."""

from collections.abc import Mapping
from typing import Any

from deme_core.digests import canonical_json
from deme_core.metrics import higher_is_better
from deme_core.verdict import RowScores
from tasks.runtime import Runtime


def log_run_metrics(runtime: Runtime, report: Mapping[str, Any]) -> None:
    """Logs rows, gains and verdicts of a run of the whole method."""
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
            "deme.primary_metric": report["metric"],
            "deme.fingerprint": report["fingerprint"],
            "deme.verdict.vs_pretrained": report["verdict"]["vs_pretrained"],
            "deme.verdict.vs_finetuned": report["verdict"]["vs_finetuned"],
            "deme.merged.uri": report["merged"]["uri"],
            "deme.merged.digest": report["merged"]["digest"],
            "deme.merged.weights": report["merged"]["weights"],
            "deme.finetuned.scale": report["finetuned"]["scale"],
        },
    )
    if distilled := report.get("distilled"):
        verdicts = {f"deme.distilled.verdict.{name}": verdict for name, verdict in distilled["verdict"].items()}
        runtime.tracker.set_tags(run_id, {"deme.distilled.uri": distilled["uri"], **verdicts})


def log_score_metrics(runtime: Runtime, report: Mapping[str, Any]) -> None:
    """Logs the scores of one model."""
    means = {f"{metric}/model": bounds["mean"] for metric, bounds in report["rows"]["model"].items()}
    run_id = runtime.tracker.run_id
    runtime.tracker.log_metrics(run_id, means)
    names = {"deme.model": "model", "deme.fingerprint": "fingerprint"}
    runtime.tracker.set_tags(run_id, {tag: report[name] for tag, name in names.items()})


def log_report(
    runtime: Runtime, report: Mapping[str, Any], deciding: Mapping[str, RowScores], **more: Mapping[str, Any]
) -> None:
    """Logs the report with what a later comparison of runs needs and nobody reads: replicates, and ``more``."""
    replicates = {row: scores.replicates for row, scores in deciding.items()}
    content = {**report, **more, "replicates": replicates}
    runtime.tracker.log_text(runtime.tracker.run_id, canonical_json(content), "report.json")
