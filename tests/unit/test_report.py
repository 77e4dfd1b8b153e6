"""What the report says of rows that differ."""

from types import SimpleNamespace
from typing import Any

import pytest

from deme_core.manifest import ArtifactRef
from deme_core.segments import TimestepSegment
from deme_core.verdict import Interval, RowScores
from tasks.experts import Expert
from tasks.jobs import JobResult
from tasks.report import _comparison
from tasks.report_metrics import log_run_metrics
from tasks.report_page import _copies, _search_log
from tasks.row_scores import deciding_scores, scores_by_row


def comparison(metric: str, **rows: list[float]) -> dict[str, Any]:
    """How the merged model compares with the others by one metric."""
    deciding = {row: RowScores(scores, [[score, score] for score in scores]) for row, scores in rows.items()}
    return _comparison(deciding, {row: {metric: scores} for row, scores in rows.items()}, metric, "merged")


LOW, MIDDLE, HIGH = [9.8, 11.81, 13.79], [10.0, 12.0, 14.0], [10.3, 12.31, 14.29]


@pytest.mark.parametrize(("metric", "lower", "higher"), [("fid", "better", "worse"), ("clip_score", "worse", "better")])
def test_a_verdict_is_that_on_the_merged_model_against_each_other_row(metric: str, lower: str, higher: str) -> None:
    found = comparison(metric, merged=MIDDLE, pretrained=HIGH, finetuned=LOW)
    assert found["verdict"] == {"vs_pretrained": lower, "vs_finetuned": higher}
    for kind, name in (("gain", metric), ("gain_by", "seeds"), ("gain_by", "images")):
        differences = [found[kind][f"vs_{row}"][name]["mean"] for row in ("pretrained", "finetuned")]
        assert differences == pytest.approx([-0.3, 0.2])


@pytest.mark.parametrize(("metric", "gain"), [("fid", 0.3), ("clip_score", -0.3)])
def test_a_gain_in_mlflow_is_positive_where_merging_helped(metric: str, gain: float) -> None:
    logged: dict[str, float] = {}
    tags: dict[str, Any] = {}
    tracker = SimpleNamespace(
        run_id="run",
        log_metrics=lambda _, metrics: logged.update(metrics),
        set_tags=lambda _, given: tags.update(given),
    )
    report = comparison(metric, merged=MIDDLE, pretrained=HIGH, finetuned=LOW) | {
        "rows": {"merged": {metric: {"mean": 12.0, "low": 7.0, "high": 17.0}}},
        "heldout_loss": {},
        "metric": metric,
        "fingerprint": "f",
        "merged": {"uri": "u", "digest": "d", "weights": [0.5]},
        "finetuned": {"scale": 1.0},
    }
    runtime: Any = SimpleNamespace(tracker=tracker)
    log_run_metrics(runtime, report)
    assert logged[f"{metric}/gain"] == pytest.approx(gain)
    assert logged[f"{metric}/gain_over_finetuned"] == pytest.approx(-gain * 2 / 3)
    assert [logged[f"{metric}_interval/merged_{bound}"] for bound in ("low", "high")] == [7.0, 17.0]
    assert {f"vs_{row}": tags[f"deme.verdict.vs_{row}"] for row in ("pretrained", "finetuned")} == report["verdict"]


def test_tables_have_the_deciding_metric_first_whatever_the_store_sorted() -> None:
    metrics = {"scores": {"clip_score": 1.0, "fid": 2.0}}
    stored = JobResult(ArtifactRef("file:///store/evaluate/d", "d"), metrics, True, 0.0, 0.0)
    scores = scores_by_row({"merged": [stored, stored]}, ["fid", "clip_score"])
    assert list(scores["merged"].items()) == [("fid", [2.0, 2.0]), ("clip_score", [1.0, 1.0])]


def test_every_seed_has_resamples_of_its_own() -> None:
    ref = ArtifactRef("file:///store/evaluate/d", "d")
    stored = [
        JobResult(ref, {"scores": {"fid": score}, "replicates": [score, score + 1]}, True, 0.0, 0.0)
        for score in (1.0, 3.0)
    ]
    assert deciding_scores({"merged": stored}, "fid") == {"merged": RowScores([1.0, 3.0], [[1.0, 2.0], [3.0, 4.0]])}


def test_each_weight_of_a_page_is_told_with_its_copy_and_block() -> None:
    ref = ArtifactRef("file:///store/finetune/d", "d")
    experts = [
        Expert(TimestepSegment(10 * i, 10 * i + 10), ref, Interval(-0.1, -0.2, 0.0), merged=i != 1) for i in range(3)
    ]
    copies = _copies(experts, [0.1, 0.2, 0.0, 0.0, 0.3, 0.4])
    assert [copy.weights for copy in copies] == [(0.1, 0.2), (0.0, 0.0), (0.3, 0.4)]
    tried = {"weights": [0.1, 0.2, 0.3, 0.4], "score": 1.0, "rough": False}
    found = {"candidates": [tried], "rank_correlation": {}, "num_images": 1, "num_losses": 0}
    assert _search_log("experts", found, experts, "fid", ()).weight_names == (
        "segment 0 [0, 10), block 0",
        "segment 0 [0, 10), block 1",
        "segment 2 [20, 30), block 0",
        "segment 2 [20, 30), block 1",
    )
