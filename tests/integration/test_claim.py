"""The laboratory of the claim: what its verdict is made of, and that it does nothing twice."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import claim, claim_cell
from benchmarks.laboratory import Laboratory
from benchmarks.measurement import QUICK_OVERRIDES
from deme_core.manifest import ArtifactRef
from deme_core.recipe import SearchSpec
from deme_core.recipe_file import load_recipe
from deme_core.settings import Settings
from deme_core.verdict import Interval, RowScores, image_difference, interval
from tasks.jobs import (
    ConfineJob,
    EvaluateJob,
    FinetuneJob,
    GeneratedFeaturesJob,
    GramsJob,
    HeldoutJob,
    Job,
    JobResult,
    MergeJob,
    SearchJob,
)
from tasks.work.base import JobContext
from tests.integration.test_benchmarks import last_line

BASELINE = [[10.0, 11.0, 12.5], [20.0, 19.0, 21.0], [15.0, 14.0, 15.5]]  # training seeds x sampling seeds


def cell(merged: list[float], baseline: list[float]) -> claim_cell.Cell:
    rows = {"pretrained": baseline, "finetuned": baseline, "ensemble": baseline, "merged, cma_es": merged}
    scores = {row: RowScores(by_seed) for row, by_seed in rows.items()}
    return claim_cell.Cell(
        "fid",
        scores,
        weights={"merged, cma_es": [0.5, 0.5]},
        heldout={"pretrained": 0.1},
        loss_changes={"merged, cma_es": [0.012, -0.34]},
    )


@pytest.mark.parametrize(
    ("gains", "holds"),
    [
        ([1.0, 1.1, 0.9], True),
        ([1.0, 1.1, -0.1], False),  # Better for two training seeds out of three is no claim.
        ([-1.0, -1.1, -0.9], False),
    ],
)
def test_the_claim_is_judged_over_training_seeds(
    gains: list[float], holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [cell([score - gain for score in scores], scores) for scores, gain in zip(BASELINE, gains, strict=True)]
    claim.print_setting("none", cells, [0, 1, 2])
    claim.print_claim({"none": cells}, {"recipe": "toy"})
    printed = capsys.readouterr().out
    assert "+1.2%, -34.0%" in printed
    result = last_line(printed)
    assert result["holds"] is holds
    against = Interval(**result["differences"]["none"]["merged, cma_es"]["finetuned"]["training seeds"])
    assert vars(against) == pytest.approx(vars(interval([-gain for gain in gains])))
    assert result["ratio"] == pytest.approx(1 - sum(gains) * 3 / sum(map(sum, BASELINE)))


def test_luck_that_all_training_seeds_share_is_no_claim() -> None:
    # Each training seed gains as much on average, but by what the baseline drew under one sampling seed.
    lucky = [cell([10.0, 10.0, 10.0], [10.0, 10.1, 13.0 + wobble]) for wobble in (0.0, 0.1, -0.1)]
    found = claim.differences(lucky, "merged, cma_es", "pretrained")
    assert found["training seeds"].high < 0 < found["sampling seeds"].high
    # And with one training seed there is nothing to say of others.
    steady = [cell([9.0, 9.1, 9.2], [10.0, 10.1, 10.2])]
    assert set(claim.differences(steady, "merged, cma_es", "pretrained")) == {"sampling seeds"}


@pytest.mark.parametrize("num_cells", [1, 2])
def test_a_claim_needs_two_training_seeds(num_cells: int, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell([9.0, 9.1, 9.2], [10.0, 10.1, 10.2]), cell([9.0, 9.1, 9.3], [10.0, 10.1, 10.2])][:num_cells]
    claim.print_claim({"none": cells}, {"recipe": "toy"})
    assert last_line(capsys.readouterr().out)["holds"] is (num_cells == 2)


@pytest.mark.parametrize(("merged", "holds"), [(11.0, True), (9.0, False)])
def test_a_claim_on_a_metric_that_grows_needs_higher_scores(merged: float, holds: bool) -> None:
    lower = [cell([merged, merged + 0.1, merged + last], [10.0, 10.1, 10.2]) for last in (0.2, 0.3)]
    assert claim.outcome([replace(each, metric="clip_score") for each in lower])["holds"] is holds


@pytest.mark.parametrize("shared", [False, True])
def test_a_training_seed_seeds_all_trainings_of_its_cell(shared: bool) -> None:
    arguments = ["--set", "distill={num_steps: 1}", *(["--same-pretrained"] if shared else [])]
    recipe = claim._recipe(claim._options(arguments), "none", 5)
    plain = load_recipe("digits").pretrained.training
    assert recipe.finetune.seed == recipe.distill.seed == 5
    assert recipe.pretrained.training.seed == (plain.seed if plain and shared else 5)


def test_resampled_images_of_all_training_seeds_are_one_interval() -> None:
    def resampled(score: float, spread: float) -> RowScores:
        return RowScores([score, score + 1], [[score - spread, score + spread], [score - spread, score + spread]])

    rows = {"pretrained": resampled(10.0, 0.0), "merged": resampled(9.0, 0.5)}
    cells = [claim_cell.Cell("fid", rows, weights={}, heldout={})] * 2
    images = claim.differences(cells, "merged", "pretrained")["images"]
    alone = image_difference(rows["merged"], rows["pretrained"])
    assert (images.mean, images.low) == pytest.approx((-1.0, alone.low)), "the resamples are common: no more of them"


def test_a_claim_without_resamples_rests_on_the_other_intervals() -> None:
    """With `evaluate.num_bootstrap=0` each seed has an empty list of resamples."""

    def scores(by_seed: list[float]) -> RowScores:
        return RowScores(by_seed, [[]] * 3)

    rows = {row: scores([10.0, 10.1, 10.2]) for row in ("pretrained", "finetuned")}
    cells = [
        claim_cell.Cell("fid", rows | {"merged, cma_es": scores(merged)}, weights={}, heldout={})
        for merged in ([9.0, 9.1, 9.2], [9.0, 9.1, 9.3])
    ]
    assert set(claim.differences(cells, "merged, cma_es", "finetuned")) == {"training seeds", "sampling seeds"}
    assert claim.outcome(cells)["holds"]


def test_a_cell_does_nothing_twice_and_a_second_way_to_merge_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEME_HOME", str(tmp_path))
    monkeypatch.delenv("DEME_STORE_URI", raising=False)
    done, do = list[Job](), Laboratory.do

    def counted(laboratory: Laboratory, job: Job) -> JobResult:
        result = do(laboratory, job)
        if not result.cached:
            done.append(job)
        return result

    monkeypatch.setattr(Laboratory, "do", counted)
    recipe = load_recipe("digits", [*QUICK_OVERRIDES, "finetune.replay=pretrained"])
    first = claim_cell.run_cell(recipe, ["cma_es"], soup=True)
    assert set(first.scores) == {"pretrained", "finetuned", "merged, cma_es", "soup", "ensemble"}
    trained = [job for job in done if isinstance(job, FinetuneJob)]
    assert len(trained) == 2 + 1 + 2, "copies of segments, the control, copies of all timesteps"
    assert len({job.finetune.seed for job in trained[-2:]}) == 2
    # Where all timesteps are the segment there is nothing to replay.
    assert [job.finetune.replay for job in trained] == ["pretrained"] * 2 + ["data"] * 3
    laboratory = Laboratory(recipe)
    of_pretrained, low, high = map(laboratory.heldout, (laboratory.pretrained.ref, *laboratory.experts()))
    assert laboratory.edges == (0, 500, 1000) and len(low) == 20, "ten bins of equal widths in each segment"
    own = [sum(low[:10]) / sum(of_pretrained[:10]) - 1, sum(high[10:]) / sum(of_pretrained[10:]) - 1]
    assert first.loss_changes["ensemble"] == pytest.approx(own, abs=1e-5)
    assert first.loss_changes["pretrained"] == [0.0, 0.0]
    done.clear()
    assert claim_cell.run_cell(recipe, ["cma_es"], soup=True) == first
    assert not done
    more = claim_cell.run_cell(recipe, ["cma_es", "regmean"])
    assert more.scores["merged, cma_es"] == first.scores["merged, cma_es"]
    assert {type(job) for job in done} <= {
        *(GramsJob, ConfineJob, MergeJob, HeldoutJob, GeneratedFeaturesJob, EvaluateJob)
    }


def test_the_deciding_metric_is_the_recipes_first_whatever_order_a_manifest_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe("digits", ["evaluate.metrics=[kid,fid]", "evaluate.seeds=[1,2,3]"])
    ref = ArtifactRef("file:///any/any/" + "0" * 64, "0" * 64)
    scores = {"fd_efficientnet_lite0": 5.0, "kd_efficientnet_lite0": 0.1}
    done = JobResult(ref, {"scores": scores, "replicates": [0.1, 0.2]}, True, 0.0, 0.0)
    monkeypatch.setattr(Laboratory, "__init__", lambda self: setattr(self, "recipe", recipe))
    monkeypatch.setattr(Laboratory, "do", lambda _self, _job: done)
    found = Laboratory().scores_by_metric((ref,))  # type: ignore[call-arg]
    assert list(found.items()) == [
        ("kd_efficientnet_lite0", RowScores([0.1] * 3, [[0.1, 0.2]] * 3)),
        ("fd_efficientnet_lite0", RowScores([5.0] * 3)),
    ]
    assert Laboratory().scores((ref,)) == [0.1] * 3  # type: ignore[call-arg]


@pytest.mark.parametrize(("asked", "natural"), [(None, 1.0), (0.4, 0.4)])
def test_searches_start_where_the_flow_has_them_start_and_only_the_control_is_one(
    asked: float | None, natural: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("digits", ["segments.count=1", f"merge.search.initial_weight={asked or 'null'}"])
    done = JobResult(ArtifactRef("file:///any/any/" + "0" * 64, "0" * 64), {"weights": [0.5]}, True, 0.0, 0.0)
    searches = list[SearchJob]()

    def build(self: Laboratory) -> None:
        self.recipe, self.pretrained, self.edges = recipe, done, (0, 1000)
        self.context = JobContext(Settings(), "cpu")

    def search(job: SearchJob, *_: Any) -> JobResult:
        searches.append(job)
        return done

    monkeypatch.setattr(Laboratory, "__init__", build)
    monkeypatch.setattr(Laboratory, "do", lambda _self, _job: done)
    monkeypatch.setattr("benchmarks.laboratory.search_artifact", search)
    claim_cell._models(Laboratory(), ["cma_es", "ties", "regmean, searched"])  # type: ignore[call-arg]
    # One segment has one copy, as the control is one.
    assert [job.is_control for job in searches] == [True, False, False, False]
    assert [job.search.initial_weight for job in searches] == [asked, asked, natural, natural]


def test_each_row_of_a_cell_is_of_the_model_that_it_is_called_by(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["segments={count: 2}", "distill={num_steps: 3}", "finetune.seed=3", "evaluate.seeds=[4,5,6]"]
    recipe = load_recipe("digits", settings)
    asked, searches = dict[str, Any](), list[SearchJob]()

    def done(digest: str, weights: list[float]) -> JobResult:
        scores = dict.fromkeys(recipe.evaluate.score_names, 1.0)
        metrics = {"weights": weights, "mean": 0.1, "scores": scores, "replicates": []}
        return JobResult(ArtifactRef(f"file:///any/any/{digest}", digest), metrics, True, 0.0, 0.0)

    def build(self: Laboratory, given: Any) -> None:
        self.recipe, self.pretrained, self.edges = given, done("theta_0", []), (0, 500, 1000)
        self.context = JobContext(Settings(), "cpu")

    def do(_: Laboratory, job: Job) -> JobResult:
        asked[digest := str(len(asked))] = job
        return done(digest, [])

    def search(job: SearchJob, *_: Any) -> JobResult:
        searches.append(job)
        return done("search", [0.7] * len(job.experts))

    monkeypatch.setattr(Laboratory, "__init__", build)
    monkeypatch.setattr(Laboratory, "do", do)
    monkeypatch.setattr(Laboratory, "loss_changes", lambda *_: [0.0, 0.0])
    monkeypatch.setattr("benchmarks.laboratory.search_artifact", search)
    rows = claim_cell.run_cell(recipe, ["regmean", "uniform"], soup=True).scores
    images = [job.images for job in asked.values() if isinstance(job, GeneratedFeaturesJob)]
    assert [each.seed for each in images] == [4, 5, 6] * len(rows)
    models = {row: each.models[0].digest for row, each in zip(rows, images[::3], strict=True)}
    made = {row: asked.get(digest) for row, digest in models.items()}
    parts = {row: [asked[e.digest] for e in job.experts] for row, job in made.items() if isinstance(job, MergeJob)}
    assert models["pretrained"] == "theta_0"
    assert made["finetuned"].weights == (0.7,)
    assert parts["finetuned"][0].num_steps == recipe.num_control_steps(2)
    assert made["merged, uniform"].weights == (0.5, 0.5)
    assert [(copy.low, copy.high) for copy in parts["merged, uniform"]] == [(0, 500), (500, 1000)]
    assert made["merged, regmean"].weights == (1.0, 1.0)
    assert [copy.index for copy in parts["merged, regmean"]] == [0, 1]
    assert made["distilled"].merged.digest == models["merged, regmean"]
    assert [copy.finetune.seed for copy in parts["soup"]] == [10_031, 10_032]
    assert {asked[job.reference.digest].part for job in searches} == {"search"}


def test_an_ablation_of_the_number_of_segments_keeps_the_steps_of_all_together() -> None:
    recipe = load_recipe("digits", [])
    for name in claim_cell.ABLATIONS:
        changed = load_recipe("digits", claim_cell.ablation_overrides(recipe, name))
        in_all = changed.finetune.num_steps * changed.segments.num_segments
        assert in_all == recipe.finetune.num_steps * recipe.segments.num_segments, name
    assert load_recipe("digits", claim_cell.ablation_overrides(recipe, "N=8")).segments.num_segments == 8


def test_the_copies_of_a_soup_share_the_range_of_one_weight() -> None:
    shared = claim_cell._shared_range(SearchSpec(max_weight=2.0, min_weight=-1.0), 4)
    assert (shared.min_weight, shared.max_weight) == (-0.25, 0.5)
