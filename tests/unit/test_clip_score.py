"""The metric; the network and its preprocessing are in test_extractors."""

import numpy as np
import pytest

from deme_core.bootstrap import resample
from deme_core.metrics import METRICS, Comparison, deciding_metric, grouped_scores, score
from deme_core.reference import Reference

SCORES = np.random.default_rng(0).uniform(0, 40, 7).astype(np.float32)
FEATURES = np.random.default_rng(1).random((7, 3))
COMPARISON = Comparison(
    features=FEATURES, reference=Reference(FEATURES, "inception"), kid_subset_size=3, clip_scores=SCORES
)


def test_it_is_the_mean_over_the_images_whatever_the_extractor() -> None:
    mean = sum(float(value) for value in SCORES) / 7
    assert METRICS["clip_score"].score(COMPARISON) == pytest.approx(mean, rel=1e-12)
    scores = score(COMPARISON, ("fid", "clip_score"))
    assert list(scores) == ["fid", "clip_score"]
    assert scores["clip_score"] == METRICS["clip_score"].score(COMPARISON)


def test_a_replicate_is_the_mean_of_the_repeated_images() -> None:
    metric, resamples = deciding_metric("clip_score"), resample(7, 3, num_replicates=5, seed=1)
    assert metric is not None
    expected = [np.repeat(SCORES.astype(np.float64), count).mean() for count in resamples.generated]
    assert metric.replicates(COMPARISON, resamples) == pytest.approx(expected, rel=1e-12)


def test_groups_are_means_over_the_images_of_their_prompts() -> None:
    columns = {"Category": ("Animals", "Food & Beverage", "Animals"), "Challenge": ("Basic",) * 3, "Note": ("x",) * 3}
    groups = grouped_scores(SCORES, columns)
    animals = np.mean([SCORES[i] for i in (0, 2, 3, 5, 6)])  # Prompts 0, 2, 0, 2 and 0.
    assert groups == {
        "clip_score/category/Animals": pytest.approx(animals, rel=1e-6),
        "clip_score/category/Food & Beverage": pytest.approx((SCORES[1] + SCORES[4]) / 2, rel=1e-6),
        "clip_score/challenge/Basic": pytest.approx(SCORES.mean(), rel=1e-6),
    }
    assert grouped_scores(SCORES, {"Note": ("x",) * 3}) == {}


def test_prompts_that_no_image_was_made_of_have_no_group() -> None:
    assert list(grouped_scores(SCORES[:1], {"category": ("Arts", "Animals")})) == ["clip_score/category/Arts"]
