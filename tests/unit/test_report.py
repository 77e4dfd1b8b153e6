"""What the report says of rows that differ."""

from typing import Any

import pytest

from deme_core.manifest import ArtifactRef
from deme_core.verdict import RowScores
from tasks.jobs import JobResult
from tasks.report import _comparison
from tasks.row_scores import scores_by_row


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


def test_tables_have_the_deciding_metric_first_whatever_the_store_sorted() -> None:
    metrics = {"scores": {"clip_score": 1.0, "fid": 2.0}}
    stored = JobResult(ArtifactRef("file:///store/evaluate/d", "d"), metrics, True, 0.0, 0.0)
    scores = scores_by_row({"merged": [stored, stored]}, ["fid", "clip_score"])
    assert list(scores["merged"].items()) == [("fid", [2.0, 2.0]), ("clip_score", [1.0, 1.0])]
