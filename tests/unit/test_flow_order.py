"""What a flow asks for first, and what it takes from overrides; without Prefect and without work."""

import json
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from deme_core.errors import InputError
from deme_core.manifest import ArtifactRef
from deme_core.recipe_file import load_recipe
from deme_core.segments import TimestepSegment
from flows import confinement, decouple_then_merge, merge_plan, trainings
from flows import evaluate as evaluation
from flows.encodings import EncodedDataset


class Future:
    def __init__(self, name: str, asked: list[str], error: Exception | None = None) -> None:
        self._name, self._asked, self._error = name, asked, error

    def wait(self) -> None:
        self._asked.append(self._name)

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return SimpleNamespace(ref="ref")


class Obtaining:
    def result(self) -> Any:
        return SimpleNamespace(ref="ref", metrics={"num_train_timesteps": 1000})


@pytest.mark.parametrize(
    ("ends_first", "expected"), [("pretrained", ["report", "search"]), ("real images", [])], ids=["trained", "failed"]
)
def test_too_few_real_images_end_a_run_before_it_waits_for_trainings(
    ends_first: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    stand_in_trainings = SimpleNamespace(
        imported_copies=list,
        control=lambda: Future("control", asked),
        copies=lambda: [Future("copy", asked)],
        distillation=None,
    )
    stand_ins = {
        "obtain_pretrained": SimpleNamespace(submit=lambda: Obtaining()),
        "encode_dataset": lambda *_: None,
        "Trainings": lambda *_: stand_in_trainings,
        "heldout_loss": SimpleNamespace(submit=lambda *_: Future("loss", asked)),
        "first_real_features": lambda _, part: Future(part, asked, InputError("too few images")),
        "import_matplotlib": lambda: None,
        "as_completed": lambda futures: futures if ends_first == "pretrained" else futures[::-1],
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(decouple_then_merge, name, stand_in)
    with pytest.raises(InputError, match="too few images"):
        decouple_then_merge._compare_rows(load_recipe("digits"))
    assert asked == expected


def test_copies_from_elsewhere_are_there_before_the_control_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def submit(job: Any) -> Any:
        asked.append((job.label, job.source, job.allow_pickle))
        return SimpleNamespace(result=lambda: asked.append("there"))

    monkeypatch.setattr(trainings, "import_copy", SimpleNamespace(submit=submit))
    ref, segments = (
        ArtifactRef("file:///store/pretrained/a", "a"),
        (TimestepSegment(0, 500), TimestepSegment(500, 1000)),
    )
    recipe = load_recipe("digits", ["pretrained={source: m, allow_pickle: true}", "copies=[low, high]"])
    given = trainings.Trainings(recipe, ref, EncodedDataset(), segments)
    assert len(given.imported_copies()) == 2
    assert asked == [("segment 0 [0, 500)", "low", True), ("segment 1 [500, 1000)", "high", True), "there", "there"]
    assert not trainings.Trainings(load_recipe("digits"), ref, EncodedDataset(), segments).imported_copies()


def test_a_copy_that_failed_ends_a_run_when_the_control_is_done() -> None:
    asked: list[str] = []
    copies: list[Any] = [Future("copy", asked), Future("other", asked, InputError("not finite"))]
    control: Any = Future("control", asked)
    with pytest.raises(InputError, match="not finite"):
        decouple_then_merge._results(copies, others=[control])
    assert asked == ["copy", "other", "control"]

    asked.clear()
    assert len(decouple_then_merge._results(copies[:1], others=[control])) == 1
    assert asked == ["copy"], "what needs the copies alone does not wait for the control"


def test_what_is_said_of_the_model_that_is_scored_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    @contextmanager
    def runtime(recipe: Any) -> Any:
        taken.append(recipe.pretrained)
        raise InterruptedError
        yield

    monkeypatch.setattr(evaluation, "flow_runtime", runtime)
    overrides = ["pretrained.training.num_steps=5", "pretrained.allow_pickle=true", "pretrained.revision=v2"]
    with pytest.raises(InterruptedError):
        evaluation.evaluate.fn("some/model", "digits", overrides)
    assert (taken[0].source, taken[0].allow_pickle, taken[0].revision) == ("some/model", True, "v2")
    assert taken[0].training is None


def test_a_search_is_told_what_is_known_of_the_copies_that_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(merge_plan, "search", SimpleNamespace(submit=lambda job, _: jobs.append(job)))
    known = {"strategy": "cma_es", "known_weights": [[0.1, 0.2, 0.3], [0.1, 0.9, 0.3]], "known_scales": [0.5]}
    overrides = ["segments={count: 3}", f"merge={json.dumps({'search': known})}"]
    ref = ArtifactRef("file:///store/finetune/a", "a")
    plan = merge_plan.MergePlan(load_recipe("digits", overrides), ref, (0, 300, 600, 1000), ref)
    experts: Any = [SimpleNamespace(merged=merged) for merged in (True, False, True)]
    plan.find_weights((ref, ref), experts)
    plan.find_scale(ref)
    assert [(job.is_control, len(job.experts)) for job in jobs] == [(False, 2), (True, 1)]
    assert jobs[0].search.known_weights == ((0.1, 0.3),)
    assert {job.search.known_scales for job in jobs} == {(0.5,)}


def test_the_control_is_searched_as_the_copies_are(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(merge_plan, "search", SimpleNamespace(submit=lambda job, _: jobs.append(job)))
    ref = ArtifactRef("file:///store/finetune/a", "a")
    plan = merge_plan.MergePlan(load_recipe("digits"), ref, (0, 500, 1000), ref)
    experts: Any = [SimpleNamespace(merged=True)] * 2
    plan.find_weights((ref, ref), experts)
    plan.find_scale(ref)
    copies, control = jobs
    assert {name for name, value in copies if value != getattr(control, name)} == {"experts", "is_control"}


def test_where_nothing_is_searched_the_control_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_plan, "merge", lambda job, _: job)
    ref = ArtifactRef("file:///store/finetune/a", "a")
    recipe = load_recipe("digits", ["segments={count: 2}", "merge={weights: [0.2, 0.3]}"])
    control: Any = merge_plan.MergePlan(recipe, ref, (0, 500, 1000), None).scale_control(ref, None)
    assert control.weights == (1.0,)


def test_each_copy_is_confined_by_the_matrices_of_all_under_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []

    def submit(job: Any, _: str) -> Any:
        jobs.append(job)
        ref = ArtifactRef(f"file:///store/{job.stage}/{len(jobs)}", str(len(jobs)))
        return SimpleNamespace(result=lambda: SimpleNamespace(ref=ref, metrics={"share_of_parameters": 1.0}))

    for name in ("measure_inputs", "confine"):
        monkeypatch.setattr(confinement, name, SimpleNamespace(submit=submit))
    copies = [ArtifactRef(f"file:///store/finetune/{name}", name) for name in "ab"]
    segments = [TimestepSegment(0, 400), TimestepSegment(400, 1000)]
    experts: Any = [SimpleNamespace(ref=ref, segment=segment) for ref, segment in zip(copies, segments, strict=True)]
    confined = confinement.confined_copies(load_recipe("digits"), copies[0], tuple(experts))
    assert [(job.expert, job.low, job.high) for job in jobs[:2]] == [(copies[0], 0, 400), (copies[1], 400, 1000)]
    assert [(job.expert, job.index) for job in jobs[2:]] == [(copies[0], 0), (copies[1], 1)]
    assert {tuple(ref.digest for ref in job.grams) for job in jobs[2:]} == {("1", "2")}
    assert [ref.digest for ref in confined] == ["3", "4"]
