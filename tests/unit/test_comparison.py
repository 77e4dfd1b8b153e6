"""The table and the page of several runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deme_core.errors import InputError
from deme_core.html_report.content import ComparisonContent
from deme_core.verdict import RowScores, differences, differences_in_words
from tasks import comparison, comparison_page
from tasks.comparison import comparison_table

METRIC = "fd_efficientnet_lite0"


def report(scores: list[float], replicates: list[list[float]]) -> dict[str, Any]:
    bounds = {"mean": scores[1], "low": scores[0], "high": scores[2]}
    return {
        "recipe": "race",
        "metric": METRIC,
        "rows": {"merged": {METRIC: bounds}},
        "scores": {"merged": {METRIC: scores}},
        "replicates": {"merged": replicates},
    }


def verdict(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    table = comparison_table({"theirs": theirs, "ours": ours})
    assert table["theirs"]["verdict"] == "baseline"
    return table["ours"]["verdict"]


def test_a_run_with_resamples_is_not_told_from_one_without() -> None:
    lower, higher = [9.8, 11.81, 13.79], [10.0, 12.0, 14.0]
    plain, resampled = report(higher, []), report(higher, [[score, score] for score in higher])
    assert verdict(report(lower, []), plain) == "better"
    assert verdict(report(lower, [[score, score] for score in lower]), resampled) == "better"
    assert verdict(report(lower, []), resampled) == "too close to call (only one of the two has resamples)"


def test_words_give_every_interval_that_decides() -> None:
    plain = differences(RowScores([1.0, 2.0, 3.1]), RowScores([2.0, 3.0, 4.0]))
    assert differences_in_words("fid", plain) == "fid -0.967, 95 % interval -1.11 to -0.823"
    resampled = [[score - 5, score, score + 5] for score in (1.0, 2.0, 3.0)]
    both = differences(RowScores([1.0, 2.0, 3.1], resampled), RowScores([2.0, 3.0, 4.0], [[3.0] * 3] * 3))
    assert differences_in_words("fid", both) == (
        "fid -0.967, 95 % intervals -1.11 to -0.823 over seeds and -22.5 to +20.5 over images"
    )


def test_runs_of_one_deciding_metric_are_compared_by_the_metrics_that_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated(run: str, decides: str, *others: str) -> dict[str, Any]:
        made = report([1.0, 2.0, 3.0], [])
        for kind in ("rows", "scores"):
            made[kind]["merged"] |= dict.fromkeys(others, made[kind]["merged"][METRIC])
        return made | {"mlflow_run_id": run, "conditions": {"deciding_metric": decides}}

    runs = {"a": evaluated("a", "fid", "kid"), "b": evaluated("b", "fid", "recall"), "c": evaluated("c", "kid", "kid")}
    monkeypatch.setattr(comparison, "check_tracking", lambda _: None)
    monkeypatch.setattr(comparison, "find_report", lambda _, run: runs["a" if run == "the-same" else run])
    with pytest.raises(InputError, match="Some of a, the-same are the same run; name each once"):
        comparison.comparable_reports(["a", "the-same"])
    shared = comparison.comparable_reports(["a", "b"])
    assert [set(each[kind]["merged"]) for each in shared.values() for kind in ("rows", "scores")] == [{METRIC}] * 4
    for run in runs.values():  # In the order that MLflow gives them.
        run["rows"]["merged"] = {"clip_score": run["rows"]["merged"][METRIC], **run["rows"]["merged"]}
        run["scores"]["merged"]["clip_score"] = [1.0, 2.0, 3.0]
    for row in comparison_table(comparison.comparable_reports(["a", "b"])).values():
        assert list(row) == ["recipe", "model", METRIC, "clip_score", "verdict"]
    with pytest.raises(InputError, match=r"they differ in deciding_metric \(fid, kid\)"):
        comparison.comparable_reports(["a", "c"])


def test_the_page_sets_the_merged_model_of_each_run_against_that_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(run: str, scores: list[float], *, draws_real_images: bool) -> dict[str, Any]:
        made = report(scores, [])
        for kind in ("rows", "scores"):  # In the order that MLflow gives them.
            made[kind] = {"finetuned": dict.fromkeys(made[kind]["merged"], [0.0] * 3)} | made[kind]
        curves = {
            row: {"edges": [0, 10], "changes": [dict.fromkeys(("mean", "low", "high"), change)]}
            for row, change in {"finetuned": 9.0, "merged": scores[0]}.items()
        }
        conditions = {"sampler": "ddim", "num_inference_steps": 20, "eta": 0, "reference": {"num_images": 9}}
        facts = {"num_images": 3, "seeds": [1, 2, 3], "fingerprint": "f", "draws_real_images": draws_real_images}
        return made | facts | {"mlflow_run_id": run, "conditions": conditions, "heldout_change": curves}

    def download(_: Any, run: str, name: str, folder: Path) -> Path | None:
        if name != "recipe.yaml":
            return None
        (folder / name).write_text(yaml.safe_dump({"finetune": {"consistency_weight": int(run == "b")}}))
        return folder / name

    pages: list[ComparisonContent] = []
    monkeypatch.setattr(comparison_page, "download", download)
    monkeypatch.setattr(comparison_page, "comparison_page", lambda content: pages.append(content) or "")
    runs = {
        "a": evaluated("a", [10.0, 12.0, 14.0], draws_real_images=True),
        "b": evaluated("b", [9.0, 11.1, 12.9], draws_real_images=False),
    }
    comparison_page.write_comparison(runs, tmp_path / "page.html")
    (page,) = pages
    (difference,) = page.scores.differences
    assert (difference.row, difference.baseline, difference.verdict) == ("race b", "race a", "better")
    assert not page.scores.draws_real_images
    assert [run.settings for run in page.runs] == [{"finetune.consistency_weight": value} for value in "01"]
    assert page.heldout is not None
    assert [curve.changes[0].mean for curve in page.heldout.curves.values()] == [10.0, 9.0]
