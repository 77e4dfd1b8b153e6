"""The jobs of a search on real models: scores in the store outlive a killed search, and are shared by searches."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from deme_core.activation_grams import input_grams
from deme_core.binned_losses import bin_edges
from deme_core.checkpoint import Checkpoint
from deme_core.errors import InputError, NonFiniteImagesError
from deme_core.model_folder import load_denoiser
from deme_core.recipe import DatasetSpec, EvaluateSpec, MethodSpec, RegMeanSpec, SearchSpec
from deme_core.regmean import confine
from deme_core.segments import TimestepSegment
from deme_core.settings import Settings
from tasks.jobs import (
    CandidateJob,
    ConfineJob,
    GramsJob,
    HeldoutJob,
    ImportJob,
    Job,
    JobResult,
    LossJob,
    RealFeaturesJob,
    ReferenceJob,
    ScoreJob,
    SearchJob,
)
from tasks.weight_search import search_artifact
from tasks.work.base import JobContext, execute
from tasks.work.grams import GRAMS
from tasks.work.score import candidate_settings
from tests.tiny_models import one_level_unet, randomize, write_tiny_folder

CONFIG = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
EVALUATE = EvaluateSpec(
    num_images=4, num_inference_steps=5, extractor="efficientnet_lite0", extractor_resolution=32, kid_subset_size=4
)
DATASET = DatasetSpec(source="digits", num_images=40)


class Laboratory:
    """Does jobs in this process, and notes those of candidates that the store did not have."""

    def __init__(self, home: Path) -> None:
        self.context = JobContext(Settings.model_validate({"DEME_HOME": home, "DEME_STORE_URI": None}), "cpu")
        self.measured, self.killed_after = list[CandidateJob](), 10**9
        self.models = [self._model(home, seed).ref for seed in range(3)]
        part: dict[str, Any] = {"dataset": DATASET, "evaluate": EVALUATE, "part": "search", "num_for_search": 16}
        features = self.one(RealFeaturesJob(**part, low=0, high=16)).ref
        self.reference = self.one(ReferenceJob(**part, features=(features,))).ref

    def _model(self, home: Path, seed: int) -> JobResult:
        folder = write_tiny_folder(home / f"model-{seed}", randomize(one_level_unet(), seed=seed), **CONFIG)
        return self.one(ImportJob(source=str(folder)))

    def one(self, job: Job) -> JobResult:
        return execute(job, self.context, lambda _: None)

    def do(self, jobs: Sequence[Job]) -> Iterator[JobResult]:
        for job in jobs:
            if len(self.measured) == self.killed_after:
                raise KeyboardInterrupt
            result = self.one(job)
            if isinstance(job, CandidateJob) and not result.cached:
                self.measured.append(job)
            yield result

    def search(self, *experts: int, evaluate: Mapping[str, Any] = MappingProxyType({}), **settings: Any) -> JobResult:
        job = SearchJob(
            pretrained=self.models[0],
            experts=tuple(self.models[expert] for expert in experts),
            method=MethodSpec(method=settings.pop("method", "task_arithmetic")),
            segment_edges=(0, 500, 1000),
            is_control=len(experts) == 1,
            search=SearchSpec.model_validate({"num_images": 4} | settings),
            evaluate=EVALUATE.model_copy(update=evaluate),
            dataset=DATASET,
            reference=self.reference,
        )
        return search_artifact(job, self.context.artifacts, self.do, lambda _: None)


@pytest.fixture
def laboratory(tmp_path: Path) -> Laboratory:
    return Laboratory(tmp_path)


def test_a_killed_search_goes_on_where_it_was(laboratory: Laboratory, tmp_path: Path) -> None:
    laboratory.killed_after = 8  # Six losses and two scores.
    with pytest.raises(KeyboardInterrupt):
        laboratory.search(1, 2, strategy="quadratic", max_candidates=5)
    laboratory.killed_after = 10**9
    result = laboratory.search(1, 2, strategy="quadratic", max_candidates=5)
    assert len({job.model_dump_json() for job in laboratory.measured}) == len(laboratory.measured)
    assert (result.cached, result.metrics["num_images"], result.metrics["num_losses"]) == (False, 5 * 4, 6 + 4), (
        "the fit's, and those of the candidates that the fit did not have"
    )

    undisturbed = Laboratory(tmp_path / "undisturbed")
    assert undisturbed.search(1, 2, strategy="quadratic", max_candidates=5).metrics == result.metrics
    assert len(undisturbed.measured) == len(laboratory.measured)


def test_a_finished_search_asks_for_nothing(laboratory: Laboratory) -> None:
    first = laboratory.search(1, 2, max_candidates=4)
    laboratory.measured.clear()
    again = laboratory.search(1, 2, max_candidates=4)
    assert (again.cached, again.ref) == (True, first.ref)
    assert again.metrics["weights"] == list(first.metrics["weights"])
    assert not laboratory.measured

    store = laboratory.context.artifacts.store
    store.put_bytes(f"weights/{first.ref.digest}/manifest.json", b"damaged")
    mended = laboratory.search(1, 2, max_candidates=4)
    assert (mended.cached, mended.ref) == (False, first.ref)
    assert mended.metrics == first.metrics
    assert not laboratory.measured, "all scores are in the store"


@pytest.mark.parametrize("num_bootstrap", [0, 200])
def test_candidates_are_not_resampled_so_that_resamples_change_no_search(
    num_bootstrap: int, laboratory: Laboratory
) -> None:
    first = laboratory.search(1, 2, max_candidates=3)
    laboratory.measured.clear()
    again = laboratory.search(1, 2, max_candidates=3, evaluate={"num_bootstrap": num_bootstrap})
    assert (again.cached, again.ref) == (True, first.ref)
    laboratory.search(1, 2, max_candidates=3, few_steps=4, evaluate={"num_bootstrap": num_bootstrap})
    assert {job.evaluate.num_inference_steps for job in laboratory.measured if isinstance(job, ScoreJob)} == {4}
    # What the digests of the default were before.
    assert candidate_settings(EVALUATE, laboratory.context)["num_bootstrap"] == 100


def test_a_score_is_the_mean_over_the_seeds_of_the_search(laboratory: Laboratory) -> None:
    def score(*seeds: int) -> float:
        job = ScoreJob(
            label="a candidate",
            pretrained=laboratory.models[0],
            experts=(laboratory.models[1],),
            method=MethodSpec(),
            weights=(0.5,),
            evaluate=EVALUATE,
            seeds=seeds,
            num_images=4,
            reference=laboratory.reference,
        )
        return float(laboratory.one(job).metrics["value"])

    assert score(7, 8) == pytest.approx((score(7) + score(8)) / 2)
    assert score(7) != pytest.approx(score(8), rel=1e-6)


def test_the_losses_of_a_candidate_add_up_to_the_reports_but_for_other_noise(laboratory: Laboratory) -> None:
    pretrained, edges = laboratory.models[0], (0, 400, 1000)
    job = LossJob(
        label="theta_0",
        pretrained=pretrained,
        experts=(laboratory.models[1],),
        method=MethodSpec(),
        weights=(0.0,),
        dataset=DATASET,
        segment_edges=edges,
    )
    of_search = sum(laboratory.one(job).metrics["value"])
    heldout = HeldoutJob(model=pretrained, dataset=DATASET, edges=bin_edges(1000, edges))
    of_report = laboratory.one(heldout).metrics["mean"]
    assert of_search == pytest.approx(of_report, rel=0.2)
    assert of_search != pytest.approx(of_report, rel=1e-5)


def test_each_copy_is_confined_to_the_inputs_of_its_own_segment(laboratory: Laboratory) -> None:
    context, (pretrained, *copies), spec = laboratory.context, laboratory.models, RegMeanSpec(num_images=8)
    models = [load_denoiser(context.open_model(model)).eval() for model in laboratory.models]
    edges = ((0, 500), (500, 1000))
    measured = [
        laboratory.one(GramsJob(expert=copy, dataset=DATASET, low=low, high=high, spec=spec)).ref
        for copy, (low, high) in zip(copies, edges, strict=True)
    ]
    grams = [Checkpoint(context.fetch(ref) / GRAMS) for ref in measured]
    expected = input_grams(
        models[2],
        context.open_model(copies[1]).adapter("cpu"),
        context.training_images(DATASET),
        segment=TimestepSegment(500, 1000),
        num_images=8,
        max_features=spec.max_features,
    )
    torch.testing.assert_close(grams[1].tensors(), {name: gram.float() for name, gram in expected.items()})

    job = ConfineJob(pretrained=pretrained, expert=copies[1], grams=tuple(measured), index=1, spec=spec)
    confined = load_denoiser(context.open_model(laboratory.one(job).ref)).state_dict()
    before, after = models[0].state_dict(), models[2].state_dict()
    torch.testing.assert_close(dict(confined), confine(before, after, 1, grams, shrinkage=spec.shrinkage))


def test_what_one_search_scored_another_does_not(laboratory: Laboratory) -> None:
    small = laboratory.search(1, 2, max_candidates=4)
    laboratory.measured.clear()
    large = laboratory.search(1, 2, max_candidates=8)
    assert len(laboratory.measured) == 4
    assert [c["score"] for c in large.metrics["candidates"]][:4] == [c["score"] for c in small.metrics["candidates"]]
    assert large.metrics["num_images"] == 8 * 4, "costs are those of the search, whoever paid"

    laboratory.measured.clear()
    laboratory.search(1, max_candidates=3)
    assert (0.0,) not in [job.weights for job in laboratory.measured], "theta_0 is the same in every search"


def test_blocks_have_weights_of_their_own(laboratory: Laboratory) -> None:
    with pytest.raises(InputError, match="max_candidates 6 is too small for 6 weights"):
        laboratory.search(1, 2, method="block_weights", max_candidates=6)
    result = laboratory.search(1, 2, method="block_weights", max_candidates=7)
    assert len(result.metrics["weights"]) == 2 * 3, "two copies, and three blocks of a network of one level"


def test_weights_that_go_too_far_are_no_end_of_a_search(laboratory: Laboratory) -> None:
    result = laboratory.search(1, 2, strategy="grid", values=(0.0, 1e30))
    assert [c["score"] is None for c in result.metrics["candidates"]] == [False, True, True, True]
    assert result.metrics["weights"] == [0.0, 0.0]
    fitted = laboratory.search(1, 2, strategy="cma_es", max_candidates=8, max_weight=4e30, initial_weight=1e30)
    scores = [c["score"] for c in fitted.metrics["candidates"]]
    assert None in scores
    assert fitted.metrics["score"] == min(score for score in scores if score is not None)


def test_a_pretrained_model_that_cannot_be_scored_is_an_error(laboratory: Laboratory, tmp_path: Path) -> None:
    broken = randomize(one_level_unet(), seed=0)
    with torch.no_grad():
        broken.conv_out.bias.fill_(float("inf"))
    folder = write_tiny_folder(tmp_path / "broken", broken, **CONFIG)
    laboratory.models[0] = laboratory.one(ImportJob(source=str(folder))).ref
    for strategy in ("grid", "quadratic"):
        with pytest.raises(NonFiniteImagesError):
            laboratory.search(1, 2, strategy=strategy)


def test_of_large_things_only_the_last_stay_in_memory(tmp_path: Path) -> None:
    context, loaded = JobContext(Settings.model_validate({"DEME_HOME": tmp_path}), "cpu"), list[str]()

    def use(key: str) -> None:
        def load() -> str:
            loaded.append(key)
            return key

        assert context.remember_latest("merge", key, load, num_kept=2) == key

    for key in "ababcacb":
        use(key)
    assert loaded == ["a", "b", "c", "a", "b"]
