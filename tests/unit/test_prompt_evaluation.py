"""Scores against prompts, by real jobs on a tiny model and a tiny CLIP model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deme_core.errors import ExtractorUnavailableError, InputError
from deme_core.extractors.clip import load_clip_score
from deme_core.feature_file import read_clip_scores
from deme_core.generate import SingleModel, generate
from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, EvaluateSpec, MethodSpec
from deme_core.sampling import Sampling
from deme_core.settings import Settings
from tasks.jobs import (
    EvaluateJob,
    GeneratedFeaturesJob,
    GeneratedImages,
    ImportJob,
    Job,
    JobResult,
    RealFeaturesJob,
    ReferenceJob,
    ScoreJob,
)
from tasks.work.base import JobContext, execute
from tasks.work.scoring import evaluation_settings
from tests.tiny_clip import write_tiny_clip
from tests.tiny_models import one_level_unet, randomize, tiny_adapter, write_tiny_folder

CONFIG = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
PROMPTS = (
    "Prompt\tCategory\tChallenge\na cat\tAnimals\tBasic\nQ! Q!\tAbstract\tBasic\ncats and bats\tAnimals\tComplex\n"
)
NUM_IMAGES = 8
DATASET = DatasetSpec(source="digits", num_images=20)


class Laboratory:
    """Does the jobs of one model's evaluation in this process."""

    def __init__(self, home: Path, clip: Path) -> None:
        home.mkdir(exist_ok=True)
        (home / "prompts.tsv").write_text(PROMPTS)
        self.home, self.clip = home, clip
        self.context = self.new_context()
        folder = write_tiny_folder(home / "model", randomize(one_level_unet(), seed=1), **CONFIG)
        self.model = self.do(ImportJob(source=str(folder))).ref

    def new_context(self) -> JobContext:
        """Another process, as far as what is remembered goes."""
        return JobContext(Settings.model_validate({"DEME_HOME": self.home, "DEME_STORE_URI": None}), "cpu")

    def do(self, job: Job) -> JobResult:
        return execute(job, self.context, lambda _: None)

    def spec(self, **changes: Any) -> EvaluateSpec:
        settings: dict[str, Any] = {
            "num_images": NUM_IMAGES,
            "num_inference_steps": 4,
            "batch_size": 4,
            "extractor": "efficientnet_lite0",
            "extractor_resolution": 32,
            "metrics": ("fid", "clip_score"),
            "num_bootstrap": 3,
            "prompts": str(self.home / "prompts.tsv"),
            "clip_weights": str(self.clip),
        }
        return EvaluateSpec.model_validate(settings | changes)

    def features(self, spec: EvaluateSpec, low: int = 0, high: int = NUM_IMAGES) -> JobResult:
        images = GeneratedImages(models=(self.model,), edges=None, seed=1)
        return self.do(GeneratedFeaturesJob(label="Row model", images=images, evaluate=spec, low=low, high=high))

    def reference(self, spec: EvaluateSpec) -> ArtifactRef:
        part: dict[str, Any] = {"dataset": DATASET, "evaluate": spec, "part": "report", "num_for_search": 0}
        real = self.do(RealFeaturesJob(**part, low=0, high=20)).ref
        return self.do(ReferenceJob(**part, features=(real,))).ref

    def evaluated(self, spec: EvaluateSpec, *features: JobResult) -> JobResult:
        images = GeneratedImages(models=(self.model,), edges=None, seed=1)
        refs = tuple(result.ref for result in features)
        return self.do(EvaluateJob(images=images, features=refs, evaluate=spec, reference=self.reference(spec)))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Of this seed all scores are positive, and each prompt has its own.
    return write_tiny_clip(tmp_path_factory.mktemp("clip"), seed=3)


@pytest.fixture
def laboratory(tmp_path: Path, clip: Path) -> Laboratory:
    return Laboratory(tmp_path / "home", clip)


def expected_scores(clip: Path, tmp_path: Path) -> np.ndarray:
    """The image set generated at once, each image scored with its prompt."""
    sampling = Sampling(num_inference_steps=4, batch_size=4)
    model = SingleModel(randomize(one_level_unet(), seed=1))
    made = generate(model, tiny_adapter(), sampling, seed=1, indices=range(NUM_IMAGES))
    prompts = (["a cat", "Q! Q!", "cats and bats"] * 3)[:NUM_IMAGES]
    return load_clip_score(weights=str(clip), cache=tmp_path, device="cpu")(torch.cat(list(made)), prompts)


def test_slices_keep_one_clip_score_per_image_and_the_row_gets_their_mean(
    laboratory: Laboratory, clip: Path, tmp_path: Path
) -> None:
    spec, expected = laboratory.spec(), expected_scores(clip, tmp_path)
    slices = [laboratory.features(spec, low, low + 4) for low in (0, 4)]
    kept = read_clip_scores([laboratory.context.fetch(result.ref) for result in slices])
    np.testing.assert_allclose(kept, expected, rtol=1e-4, atol=1e-3)
    assert expected.max() - expected.min() > 1

    metrics = laboratory.evaluated(spec, *slices).metrics
    assert list(metrics["scores"]) == ["fd_efficientnet_lite0", "clip_score"]
    assert metrics["scores"]["clip_score"] == pytest.approx(kept.mean(), rel=1e-6)
    assert metrics["details"] == {
        "clip_score/category/Abstract": pytest.approx(kept[[1, 4, 7]].mean(), rel=1e-6),
        "clip_score/category/Animals": pytest.approx(kept[[0, 2, 3, 5, 6]].mean(), rel=1e-6),
        "clip_score/challenge/Basic": pytest.approx(kept[[0, 1, 3, 4, 6, 7]].mean(), rel=1e-6),
        "clip_score/challenge/Complex": pytest.approx(kept[[2, 5]].mean(), rel=1e-6),
    }
    assert len(metrics["replicates"]) == 3
    whole = laboratory.evaluated(spec, laboratory.features(spec))
    assert whole.cached, "how the set was sliced is no part of the digest"


def test_the_clip_score_may_decide(laboratory: Laboratory) -> None:
    spec = laboratory.spec(metrics=("clip_score",))
    result = laboratory.evaluated(spec, laboratory.features(spec))
    assert list(result.metrics["scores"]) == ["clip_score"]
    assert np.mean(result.metrics["replicates"]) == pytest.approx(result.metrics["scores"]["clip_score"], rel=0.2)


def test_conditions_name_prompts_and_clip_only_where_they_are_used(laboratory: Laboratory) -> None:
    def conditions(**changes: Any) -> dict[str, Any]:
        spec = laboratory.spec(**changes)
        found: dict[str, Any] = laboratory.evaluated(spec, laboratory.features(spec)).metrics["conditions"]
        return found

    plain = {"metrics": ("fid",), "prompts": None, "clip_weights": None}
    assert not {"prompts", "clip"} & set(conditions(**plain))
    prompted, scored = conditions(**plain | {"prompts": laboratory.spec().prompts}), conditions()
    assert "clip" not in prompted
    assert prompted["prompts"] == scored["prompts"]
    assert set(scored) - set(conditions(**plain)) == {"prompts", "clip"}


def test_without_prompts_the_digests_are_what_they_were(laboratory: Laboratory) -> None:
    spec = laboratory.spec(metrics=("fid", "kid"), prompts=None, clip_weights=None)
    settings = evaluation_settings(spec, laboratory.context, exclude={"seeds"})
    assert settings == spec.model_dump(mode="json", exclude={"seeds"})


def test_digests_follow_the_content_of_prompts_and_weights(laboratory: Laboratory, clip: Path, tmp_path: Path) -> None:
    first = laboratory.features(laboratory.spec())
    moved = tmp_path / "moved.tsv"
    moved.write_text(PROMPTS)
    copied = write_tiny_clip(tmp_path / "copied", seed=3)
    assert laboratory.features(laboratory.spec(prompts=str(moved), clip_weights=str(copied))).ref == first.ref
    other = write_tiny_clip(tmp_path / "other", seed=1)
    digests = {first.ref.digest, laboratory.features(laboratory.spec(clip_weights=str(other))).ref.digest}
    (laboratory.home / "prompts.tsv").write_text(PROMPTS.replace("a cat", "a bat"))
    laboratory.context = laboratory.new_context()
    digests.add(laboratory.features(laboratory.spec()).ref.digest)
    assert len(digests) == 3


def test_images_scored_against_other_prompts_are_refused(laboratory: Laboratory) -> None:
    features = laboratory.features(laboratory.spec())
    (laboratory.home / "prompts.tsv").write_text(PROMPTS.replace("a cat", "a bat"))
    laboratory.context = laboratory.new_context()
    with pytest.raises(InputError, match=r"give every machine the same evaluate\.prompts"):
        laboratory.evaluated(laboratory.spec(), features)


def test_clip_weights_that_are_not_there_are_one_sentence(laboratory: Laboratory, tmp_path: Path) -> None:
    spec = laboratory.spec(clip_weights=str(tmp_path / "absent"))
    with pytest.raises(ExtractorUnavailableError, match=r"no config\.json .*; set evaluate\.clip_weights to") as error:
        laboratory.features(spec)
    assert "\n" not in str(error.value)


def test_a_candidate_of_a_search_is_scored_against_the_prompts(laboratory: Laboratory) -> None:
    spec = laboratory.spec(metrics=("clip_score",))
    job = ScoreJob(
        label="a candidate",
        pretrained=laboratory.model,
        experts=(),
        method=MethodSpec(),
        weights=(),
        evaluate=spec,
        seeds=(1,),
        num_images=NUM_IMAGES,
        reference=laboratory.reference(spec),
    )
    score = laboratory.evaluated(spec, laboratory.features(spec)).metrics["scores"]["clip_score"]
    assert laboratory.do(job).metrics["value"] == pytest.approx(score, rel=1e-5)
