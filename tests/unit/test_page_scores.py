"""Scores as a page shows them."""

import pytest

from deme_core.verdict import RowScores, differences, row_intervals
from tasks.page_scores import evaluation_facts, page_scores

METRIC = "fid"
SCORES = {
    "pretrained": {METRIC: [10.0, 12.0, 14.0], "precision": [0.5, 0.6, 0.7]},
    "merged": {METRIC: [9.0, 11.1, 12.9], "precision": [0.6, 0.7, 0.9]},
}
DECIDING = {
    row: RowScores(by_metric[METRIC], [[score - 0.1, score, score + 0.1] for score in by_metric[METRIC]])
    for row, by_metric in SCORES.items()
}


def test_the_metric_that_decides_comes_first_with_both_intervals_and_a_verdict() -> None:
    page = page_scores(SCORES, DECIDING, METRIC, [("merged", "pretrained")])
    first, second = page.differences
    found = differences(DECIDING["merged"], DECIDING["pretrained"])
    assert (first.metric, first.seeds, first.images) == (METRIC, found["seeds"], found["images"])
    assert first.verdict == "better"
    assert (second.metric, second.images, second.verdict) == ("precision", None, None)
    assert second.seeds.mean == pytest.approx(0.4 / 3)
    assert page.deciding == (first,)
    assert page.higher_is_better == {"precision"}


def test_rows_have_the_interval_over_images_where_they_were_resampled() -> None:
    rows = page_scores(SCORES, DECIDING, METRIC, []).rows
    assert rows["merged"][METRIC].images == row_intervals(DECIDING["merged"])["images"]
    assert rows["merged"][METRIC].by_seed == (9.0, 11.1, 12.9)
    assert rows["merged"]["precision"].images is None
    plain = {row: RowScores(scores.by_seed) for row, scores in DECIDING.items()}
    assert page_scores(SCORES, plain, METRIC, []).rows["merged"][METRIC].images is None


def test_facts_say_how_scores_came_about() -> None:
    conditions = {"sampler": "ddim", "num_inference_steps": 20, "eta": 0.5, "reference": {"num_images": 1197}}
    report = {"conditions": conditions, "num_images": 3000, "seeds": [1, 2], "fingerprint": "a" * 64}
    expected = {
        "images": "3,000 for each of 2 seeds (1, 2)",
        "sampler": "ddim, 20 steps, eta 0.5",
        "real images": "1,197",
        "evaluation": "a" * 12,
    }
    assert evaluation_facts(report) == expected
    guided = {**report, "conditions": {**conditions, "guidance_scale": 7.5}}
    assert evaluation_facts(guided) == {**expected, "guidance": "7.5"}


@pytest.mark.parametrize("drawn", [True, False])
def test_the_page_is_told_whether_real_images_were_drawn(drawn: bool) -> None:
    assert page_scores(SCORES, DECIDING, METRIC, [], draws_real_images=drawn).draws_real_images == drawn
