"""Which subsets of images the kernel distance of a row takes, by real jobs on a tiny model."""

from pathlib import Path
from typing import Any

import pytest

from deme_core.bootstrap import resample
from deme_core.recipe import DatasetSpec, EvaluateSpec
from deme_core.settings import Settings
from tasks.jobs import EvaluateJob, GeneratedFeaturesJob, GeneratedImages, ImportJob, RealFeaturesJob, ReferenceJob
from tasks.work import evaluate
from tasks.work.base import JobContext, execute
from tests.tiny_models import one_level_unet, randomize, write_tiny_folder

CONFIG = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
SPEC = EvaluateSpec(
    num_images=8,
    num_inference_steps=4,
    extractor="efficientnet_lite0",
    extractor_resolution=32,
    metrics=("fid", "kid"),
    kid_subset_size=3,
    num_bootstrap=0,
)


class Row:
    """A row of which every seed has the same images."""

    def __init__(self, home: Path, spec: EvaluateSpec) -> None:
        self.context = JobContext(Settings.model_validate({"DEME_HOME": home, "DEME_STORE_URI": None}), "cpu")
        folder = write_tiny_folder(home / "model", randomize(one_level_unet(), seed=1), **CONFIG)
        dataset = DatasetSpec(source="digits", num_images=20)
        part: dict[str, Any] = {"dataset": dataset, "evaluate": spec, "part": "report", "num_for_search": 0}
        real = self._do(RealFeaturesJob(**part, low=0, high=20)).ref
        images = GeneratedImages(models=(self._do(ImportJob(source=str(folder))).ref,), edges=None, seed=1)
        made = self._do(GeneratedFeaturesJob(label="a row", images=images, evaluate=spec, low=0, high=8)).ref
        reference = self._do(ReferenceJob(**part, features=(real,))).ref
        self.job = EvaluateJob(images=images, features=(made,), evaluate=spec, reference=reference)

    def metrics(self, seed: int, **images_of: Any) -> dict[str, Any]:
        images = self.job.images.model_copy(update={"seed": seed, **images_of})
        found: dict[str, Any] = self._do(self.job.model_copy(update={"images": images})).metrics
        return found

    def _do(self, job: Any) -> Any:
        return execute(job, self.context, lambda _: None)


def test_every_sampling_seed_has_subsets_of_its_own(tmp_path: Path) -> None:
    row = Row(tmp_path, SPEC)
    first, second = (row.metrics(seed)["scores"] for seed in (1, 2))
    assert first["fd_efficientnet_lite0"] == second["fd_efficientnet_lite0"]
    assert first["kd_efficientnet_lite0"] != pytest.approx(second["kd_efficientnet_lite0"], rel=1e-6)
    ensemble = {"models": row.job.images.models * 2, "edges": (0, 500, 1000)}
    assert row.metrics(1, **ensemble)["scores"] == first, "another row has the same"
    (tmp_path / "again").mkdir()
    assert Row(tmp_path / "again", SPEC).metrics(1)["scores"] == pytest.approx(first, rel=1e-6)


def test_scores_with_the_same_subsets_for_all_seeds_are_told_from_these_where_they_decide(tmp_path: Path) -> None:
    deciding = Row(tmp_path, SPEC.model_copy(update={"metrics": ("kid",)})).metrics(1)["conditions"]
    assert deciding["kid_subsets"] == "of each sampling seed"
    (tmp_path / "other").mkdir()
    assert "kid_subsets" not in Row(tmp_path / "other", SPEC).metrics(1)["conditions"]


def test_resamples_are_of_each_seed_and_of_the_real_images_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def draw(num_images: int, num_real_images: int | None, **settings: Any) -> Any:
        drawn.append((num_images, num_real_images, settings["seed"]))
        return resample(num_images, num_real_images, **settings)

    monkeypatch.setattr(evaluate, "resample", draw)
    row = Row(tmp_path, SPEC.model_copy(update={"metrics": ("fid",), "num_bootstrap": 4}))
    first, second = (row.metrics(seed)["replicates"] for seed in (1, 2))
    assert drawn == [(8, 20, 1), (8, 20, 2)]
    assert len(first) == 4 and first != second
