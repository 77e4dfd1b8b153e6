"""The table of several runs."""

from typing import Any

import pytest

from deme_core.errors import InputError
from deme_core.verdict import RowScores, differences, differences_in_words
from tasks import comparison
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
    with pytest.raises(InputError, match=r"they differ in deciding_metric \(fid, kid\)"):
        comparison.comparable_reports(["a", "c"])
