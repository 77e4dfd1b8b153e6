import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from deme_core.errors import ArtifactNotFoundError, DemeError
from deme_core.feature_statistics import FeatureStatistics
from deme_core.metrics import METRICS, Comparison, MetricName, deciding_metric, direction, higher_is_better, metric_name
from deme_core.metrics import score as score_comparison
from deme_core.metrics.frechet import frechet_distance_to
from deme_core.metrics.kernel import kernel_distance
from deme_core.reference import Reference, save_reference


def draw(num_images: int, num_features: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated features of an uneven spectrum, float32 as an extractor gives them."""
    mixing = np.random.default_rng(0).standard_normal((num_features, num_features))
    mixing *= np.exp(-np.arange(num_features) / (num_features / 4))[:, None]
    features = np.random.default_rng(seed).standard_normal((num_images, num_features)) @ mixing + shift
    return features.astype(np.float32)


def exactly(mean: list[float], covariance: np.ndarray) -> np.ndarray:
    """Features of exactly this mean and covariance."""
    drawn = np.random.default_rng(7).standard_normal((20, len(mean)))
    uncorrelated, _ = np.linalg.qr(drawn - drawn.mean(axis=0))
    return np.sqrt(len(drawn) - 1) * uncorrelated @ np.linalg.cholesky(covariance).T + mean


def gaussian(mean: list[float], covariance: np.ndarray) -> Reference:
    return Reference(None, "inception", given_statistics=FeatureStatistics(np.array(mean), covariance, 1000))


def root_of(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    values[values < values[-1] * 1e-13] = 0
    return vectors * np.sqrt(values) @ vectors.T


def distance_of_statistics(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The formula as the paper has it, by square roots of both covariances."""
    root = np.linalg.norm(root_of(a.covariance) @ root_of(b.covariance), "nuc")
    return float(np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root)


def reference(features: np.ndarray, name: str = "inception") -> Reference:
    return Reference(features, name, extractor_digest="e" * 64, images_digest="i" * 64)


def score(
    features: np.ndarray, real: Reference, *, metrics: tuple[MetricName, ...], kid_subset_size: int
) -> dict[str, float]:
    comparison = Comparison(features=features, reference=real, kid_subset_size=kid_subset_size)
    return score_comparison(comparison, metrics)


def test_frechet_distance_of_independent_features_is_a_sum_over_them() -> None:
    # One dimension: (m_a - m_b)^2 + (s_a - s_b)^2; independent dimensions add up.
    a = exactly([0.0, 1.0, -2.0], np.diag([1.0, 4.0, 9.0]))
    b = gaussian([3.0, 1.0, -1.0], np.diag([16.0, 4.0, 0.25]))
    assert frechet_distance_to(b, a) == pytest.approx((9 + 9) + 0 + (1 + 6.25), rel=1e-12)


def test_frechet_distance_does_not_depend_on_the_axes() -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([16.0, 4.0, 0.25])
    rotated = frechet_distance_to(
        gaussian([0.0] * 3, rotation @ b @ rotation.T), exactly([0.0] * 3, rotation @ a @ rotation.T)
    )
    assert rotated == pytest.approx(9 + 0 + 6.25, rel=1e-10)


def test_frechet_distance_agrees_with_cleanfid_where_covariances_are_regular() -> None:
    from cleanfid.fid import frechet_distance as cleanfid_distance

    features, real = draw(600, 48, seed=1), reference(draw(500, 48, seed=2, shift=0.1))
    a, b = FeatureStatistics.from_batches([features]), real.statistics
    theirs = cleanfid_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert frechet_distance_to(real, features) == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("num_images", [40, 200])
def test_frechet_distance_is_symmetric_and_zero_for_the_same_images(num_images: int) -> None:
    x, y = draw(num_images, 64, seed=1), draw(num_images + 10, 64, seed=2)
    assert frechet_distance_to(reference(x), y) == pytest.approx(frechet_distance_to(reference(y), x), rel=1e-9)
    assert frechet_distance_to(reference(x), x) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_two_pairs_of_images() -> None:
    # {u, -u} against {v, -v}: covariances 2uu' and 2vv', so the distance is 2|u|^2 + 2|v|^2 - 4|u.v|.
    u, v = np.array([1.0, 2.0, 0.0, 0.0]), np.array([3.0, -1.0, 1.0, 0.5])
    x, y = np.stack([u, -u]), np.stack([v, -v])
    expected = 2 * u @ u + 2 * v @ v - 4 * abs(u @ v)
    assert frechet_distance_to(reference(y), x) == pytest.approx(expected, rel=1e-6)
    statistics = FeatureStatistics.from_batches([y])
    assert frechet_distance_to(gaussian(list(statistics.mean), statistics.covariance), x) == pytest.approx(expected)


@pytest.mark.parametrize("num_generated", [20, 64, 65, 300])
@pytest.mark.parametrize("num_real", [30, 64, 65, 400])
def test_fast_paths_agree_with_the_statistics(num_generated: int, num_real: int) -> None:
    generated, real = draw(num_generated, 64, seed=1, shift=0.2), reference(draw(num_real, 64, seed=2))
    expected = distance_of_statistics(FeatureStatistics.from_batches([generated]), real.statistics)
    assert frechet_distance_to(real, generated) == pytest.approx(expected, rel=1e-6)


def test_a_common_shift_adds_its_square_and_the_order_of_images_adds_nothing() -> None:
    generated, real = draw(40, 16, seed=1).astype(np.float64), reference(draw(60, 16, seed=2))
    shifted = frechet_distance_to(reference(real.features + np.float32(3)), generated + np.float64(3))
    plain = frechet_distance_to(real, generated)
    assert shifted == pytest.approx(plain, rel=1e-4)
    assert frechet_distance_to(real, generated[::-1]) == pytest.approx(plain, rel=1e-10)
    centred = generated - generated.mean(axis=0) + real.statistics.mean
    moved = frechet_distance_to(real, centred + 2.0) - frechet_distance_to(real, centred)
    assert moved == pytest.approx(16 * 2.0**2, rel=1e-9)


def test_a_feature_that_never_changes_is_no_obstacle() -> None:
    generated, real = draw(100, 8, seed=1), draw(90, 8, seed=2)
    expected = frechet_distance_to(reference(real), generated)
    widened = [np.pad(features, ((0, 0), (0, 3))) for features in (real, generated)]
    assert frechet_distance_to(reference(widened[0]), widened[1]) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_that_of_cleanfid_and_leaves_numpys_generator_alone() -> None:
    from cleanfid.fid import kernel_distance as cleanfid_distance

    generated, real = draw(60, 16, seed=1, shift=0.1), draw(80, 16, seed=2)
    np.random.seed(99)
    untouched = np.random.random(3)
    np.random.seed(99)
    ours = kernel_distance(generated, real, subset_size=25, num_subsets=10, seed=7)
    np.testing.assert_array_equal(np.random.random(3), untouched)
    np.random.seed(7)
    assert ours == cleanfid_distance(real, generated, num_subsets=10, max_subset_size=25)
    assert ours == kernel_distance(generated, real, subset_size=25, num_subsets=10, seed=7)
    assert ours != kernel_distance(generated, real, subset_size=25, num_subsets=10, seed=8)


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate() -> None:
    x, y = draw(12, 5, seed=1).astype(np.float64), draw(12, 5, seed=2).astype(np.float64)

    def mean_kernel(left: np.ndarray, right: np.ndarray, *, skip_diagonal: bool) -> float:
        values = [
            (float(a @ b) / 5 + 1) ** 3
            for i, a in enumerate(left)
            for j, b in enumerate(right)
            if not (skip_diagonal and i == j)
        ]
        return sum(values) / len(values)

    expected = (
        mean_kernel(x, x, skip_diagonal=True)
        + mean_kernel(y, y, skip_diagonal=True)
        - 2 * mean_kernel(x, y, skip_diagonal=False)
    )
    assert kernel_distance(x, y, subset_size=1000, num_subsets=2, seed=0) == pytest.approx(expected, rel=1e-9)


def test_only_inception_features_may_be_called_fid() -> None:
    assert [metric_name(metric, "inception") for metric in ("fid", "kid")] == ["fid", "kid"]
    assert metric_name("fid", "dinov2_vitl14") == "fd_dinov2_vitl14"
    assert metric_name("recall", "clip_vit_b_32") == "recall_clip_vit_b_32"
    legacy = [metric_name("fid", "inception_legacy_pytorch"), metric_name("kid", "inception_legacy_tensorflow")]
    assert legacy == ["fid_legacy_pytorch", "kid_legacy_tensorflow"]
    names = [metric_name(metric, "efficientnet_lite0") for metric in ("fid", "kid")]
    assert names == ["fd_efficientnet_lite0", "kd_efficientnet_lite0"]
    with pytest.raises(ValueError, match="resnet"):
        metric_name("fid", "resnet")


def test_score_gives_each_metric_its_name() -> None:
    generated, real = draw(30, 8, seed=1), reference(draw(40, 8, seed=2), "efficientnet_lite0")
    scores = score(generated, real, metrics=("kid", "fid"), kid_subset_size=10)
    assert scores == {
        "kd_efficientnet_lite0": kernel_distance(generated, real.features, subset_size=10, seed=0),
        "fd_efficientnet_lite0": frechet_distance_to(real, generated),
    }
    assert list(score(generated, real, metrics=("fid",), kid_subset_size=10)) == ["fd_efficientnet_lite0"]


def test_a_reference_scores_the_same_after_a_round_trip(tmp_path: Path) -> None:
    generated, real = draw(30, 8, seed=1), reference(draw(40, 8, seed=2).astype(np.float64))
    path = real.save(tmp_path / "a")
    loaded = Reference.load(tmp_path / "a")
    assert (loaded.num_images, loaded.extractor_name) == (40, "inception")
    assert (loaded.extractor_digest, loaded.images_digest) == ("e" * 64, "i" * 64)
    both = [score(generated, one, metrics=("fid", "kid"), kid_subset_size=10) for one in (real, loaded)]
    assert both[0] == both[1]
    assert loaded.save(tmp_path / "b").read_bytes() == path.read_bytes()
    with pytest.raises(ArtifactNotFoundError, match=r"reference\.safetensors"):
        Reference.load(tmp_path)


@pytest.mark.parametrize("name", ["inception", "efficientnet_lite0"])  # Headers of two lengths.
def test_a_reference_written_in_batches_is_the_file_that_safetensors_writes(name: str, tmp_path: Path) -> None:
    features = draw(40, 8, seed=1)
    content = {"extractor_digest": "e" * 64, "extractor_name": name, "images_digest": "i" * 64}
    save_file({"features": features}, tmp_path / "expected", metadata={"deme": json.dumps(content)})
    batches = (features[:17], features[17:32].astype(np.float64), np.asfortranarray(features[32:]))
    path = save_reference(tmp_path / "a", batches, num_images=40, **content)
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()
    assert reference(features, name).save(tmp_path / "b").read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="NaN or infinite"):
        save_reference(tmp_path / "c", [features, features * np.float32(np.nan)], num_images=80, **content)


def test_a_loaded_reference_is_reduced_without_its_features_in_memory(tmp_path: Path) -> None:
    features = np.random.default_rng(1).standard_normal((40_000, 16)).astype(np.float32)
    reference(features).save(tmp_path)
    tracemalloc.start()
    try:
        found = Reference.load(tmp_path).statistics
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < features.nbytes / 2
    np.testing.assert_allclose(found.mean, features.mean(axis=0, dtype=np.float64), atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    features, real = draw(10, 4, seed=1), reference(draw(10, 4, seed=2))
    features[3, 2] = bad
    for metrics in (("fid",), ("kid",)):
        with pytest.raises(DemeError, match="1 of 10 images are NaN or infinite"):
            score(features, real, metrics=metrics, kid_subset_size=5)
    with pytest.raises(ValueError, match="1 of 10"):
        reference(features)


@pytest.mark.parametrize("shape", [(1, 4), (4,), (2, 3, 4)])
def test_too_few_images_or_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        frechet_distance_to(reference(draw(10, 4, seed=2)), np.zeros(shape))


def test_features_of_other_widths_or_empty_subsets_are_refused() -> None:
    generated, real = draw(10, 4, seed=1), reference(draw(10, 5, seed=2))
    for metrics in (("fid",), ("kid",)):
        with pytest.raises(ValueError, match="4 features"):
            score(generated, real, metrics=metrics, kid_subset_size=5)
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(generated, generated, subset_size=1, seed=0)


def test_a_frechet_distance_alone_imports_nothing_slow() -> None:
    program = (
        "import sys, numpy as np; from deme_core.metrics import Comparison, score; "
        "from deme_core.reference import Reference; features = np.random.default_rng(0).random((20, 4)); "
        "real = Reference(features, 'inception'); "
        "score(Comparison(features=features, reference=real, kid_subset_size=10), ['fid']); "
        "print(sorted({'cleanfid', 'scipy', 'torch', 'torchvision'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"


def test_recipe_names_metrics_of_the_registry_and_each_says_what_it_needs() -> None:
    assert {name: (metric.needs, metric.higher_is_better) for name, metric in METRICS.items()} == {
        "fid": ("statistics", False),
        "kid": ("features", False),
        "precision": ("features", True),
        "recall": ("features", True),
        "clip_score": ("prompts", True),
    }
    assert [name for name in METRICS if deciding_metric(name)] == ["fid", "kid", "clip_score"]


def test_a_reported_name_tells_which_way_is_better() -> None:
    assert not higher_is_better("fd_efficientnet_lite0")
    assert not higher_is_better("kid_legacy_tensorflow")
    assert higher_is_better("recall_clip_vit_b_32")
    assert higher_is_better("precision_legacy_pytorch")
    assert higher_is_better(metric_name("clip_score", "inception"))
    with pytest.raises(ValueError, match="reported as 'fd'"):
        higher_is_better("fd")


def test_a_table_says_which_way_its_columns_go() -> None:
    assert direction(["fid", "kid"]) == "lower is better"
    assert direction(["clip_score"]) == "higher is better"
    assert direction(["recipe", "clip_score", "verdict"]) == "higher is better"
    assert direction(["fid", "precision", "recall"]) == "lower is better, but higher of precision and recall"


def test_a_metric_that_lacks_what_it_needs_says_so() -> None:
    features = draw(30, 8, seed=1)
    statistics_only = Reference(None, "inception", given_statistics=FeatureStatistics.from_batches([features]))
    for metric in ("kid", "precision", "recall"):
        with pytest.raises(ValueError, match="holds statistics only"):
            score(features, statistics_only, metrics=(metric,), kid_subset_size=5)
    with pytest.raises(ValueError, match="there are none"):
        score(features, statistics_only, metrics=("clip_score",), kid_subset_size=5)
