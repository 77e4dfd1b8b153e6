import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from deme_core.errors import InputError
from deme_core.feature_file import read_features, save_features
from deme_core.feature_statistics import FeatureStatistics, factor_of
from deme_core.metrics import Comparison, score
from deme_core.metrics.frechet import frechet_distance_to
from deme_core.reference import Reference

FEATURES = (np.random.default_rng(0).standard_normal((50, 6)) + 100.0).astype(np.float32)


@pytest.mark.parametrize("cuts", [[], [1], [2, 3, 30], [25], [49]])
def test_batches_give_the_statistics_of_all_features_at_once(cuts: list[int]) -> None:
    streamed = FeatureStatistics.from_batches(np.split(FEATURES, cuts))
    assert streamed.num_images == 50
    assert streamed.mean.dtype == streamed.covariance.dtype == np.float64
    np.testing.assert_allclose(streamed.mean, FEATURES.mean(axis=0, dtype=np.float64), rtol=1e-13)
    np.testing.assert_allclose(streamed.covariance, np.cov(FEATURES, rowvar=False, dtype=np.float64), rtol=1e-10)


@pytest.mark.parametrize("batches", [[], [FEATURES[:1]]])
def test_one_image_has_no_covariance(batches: list[np.ndarray]) -> None:
    with pytest.raises(InputError, match="at least 2 images"):
        FeatureStatistics.from_batches(batches)


def test_a_bad_batch_is_an_error() -> None:
    with pytest.raises(InputError, match="features of 1 of 2 images"):
        FeatureStatistics.from_batches([FEATURES, np.array([[np.nan] * 6, [0.0] * 6])])


def test_features_are_read_back_slice_after_slice(tmp_path: Path) -> None:
    long = np.repeat(FEATURES, 30, axis=0)
    for index, part in enumerate((long[:1100], long[1100:])):
        (tmp_path / str(index)).mkdir()
        save_features(tmp_path / str(index), part)
    batches = list(read_features([tmp_path / "0", tmp_path / "1"]))
    assert [len(batch) for batch in batches] == [1024, 76, 400]
    assert (np.concatenate(batches) == long).all()


def test_a_reference_of_statistics_scores_as_one_of_features(tmp_path: Path) -> None:
    generated = FEATURES[:20] * 1.1
    features = Reference(FEATURES, "inception", "e", "i")
    statistics = Reference(None, "inception", "e", "i", FeatureStatistics.from_batches([FEATURES]))
    statistics.save(tmp_path)
    loaded = Reference.load(tmp_path)
    assert (loaded.num_images, loaded.images_digest) == (50, "i")
    expected = frechet_distance_to(features, generated)
    assert frechet_distance_to(loaded, generated) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="statistics only"):
        score(Comparison(features=generated, reference=loaded, kid_subset_size=5), ["kid"])


@pytest.mark.parametrize("num_slices", [1, 3])
def test_the_memory_of_statistics_does_not_grow_with_the_images(num_slices: int, tmp_path: Path) -> None:
    def peak_bytes(num_images: int) -> int:
        folders = [tmp_path / f"{num_images} {index}" for index in range(num_slices)]
        for folder in folders:
            folder.mkdir()
            save_features(folder, np.zeros((num_images // num_slices, 32), np.float32))
        tracemalloc.start()
        try:
            assert FeatureStatistics.from_batches(read_features(folders)).num_images == num_images
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = peak_bytes(3 * 1024)
    assert peak_bytes(30 * 1024) < 1.1 * few < 30 * 1024 * 32 * 4


def test_a_factor_is_that_of_features_of_any_scale() -> None:
    covariance = np.diag([1e-9, 4e-9, 0.0])
    factor = factor_of(covariance)
    assert len(factor) == 2
    np.testing.assert_allclose(factor.T @ factor, covariance, atol=1e-20)
