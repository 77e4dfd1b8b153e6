"""What a flow asks for first, and what it takes from overrides; without Prefect and without work."""

import json
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from deme_core.errors import InputError
from deme_core.manifest import ArtifactRef
from deme_core.recipe_file import load_recipe
from deme_core.segments import TimestepSegment
from flows import confinement, decouple_then_merge, encodings, merge_plan, trainings
from flows import evaluate as evaluation
from flows import evaluation as row_evaluation
from flows.encodings import EncodedDataset
from tasks.jobs import JobResult


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
    ("ends_first", "expected"),
    [("pretrained", ["check", "report", "search"]), ("real images", [])],
    ids=["trained", "failed"],
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
        "CheckJob": lambda **_: "check",
        "check_model": asked.append,
        "import_matplotlib": lambda: None,
        "as_completed": lambda futures: futures if ends_first == "pretrained" else futures[::-1],
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(decouple_then_merge, name, stand_in)
    with pytest.raises(InputError, match="too few images"):
        decouple_then_merge._compare_rows(load_recipe("digits"))
    assert asked == expected


def test_what_the_model_cannot_do_ends_a_run_before_anything_is_encoded_or_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(job: Any) -> None:
        raise InputError(f"{job.pretrained.digest} has no such sampling as {len(job.demands.samplings)} of these")

    theta_0 = ArtifactRef("file:///store/pretrained/a", "theta_0")
    obtained = SimpleNamespace(result=lambda: SimpleNamespace(ref=theta_0, metrics={"num_train_timesteps": 1000}))
    stand_ins = {
        "obtain_pretrained": SimpleNamespace(submit=lambda: obtained),
        "first_real_features": lambda _, part: Future(part, []),
        "as_completed": list,
        "check_model": refuse,
        "encode_dataset": None,
        "Trainings": None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(decouple_then_merge, name, stand_in)
    with pytest.raises(InputError, match="theta_0 has no such sampling as 2 of these"):
        decouple_then_merge._compare_rows(load_recipe("digits", ["merge.search.few_steps=4"]))


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


class Done:
    """A future whose result is an artifact of this name."""

    def __init__(self, ref: str, **metrics: Any) -> None:
        self._result = SimpleNamespace(ref=ref, metrics=metrics)

    def wait(self) -> None:
        """Returns at once."""

    def result(self) -> Any:
        return self._result


def test_each_row_loss_and_training_is_of_the_model_that_it_is_called_by(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, Any] = {}
    losses: dict[str, str] = {}

    def submit_row(_: Any, row: str, *given: Any) -> Done:
        rows[row] = given
        return Done(row)

    def submit_loss(ref: str, _: Any, what: str) -> Done:
        losses[what] = ref
        return Done(what)

    class Plan:
        searches: ClassVar[dict[str, Any]] = {}

        def __init__(self, *_: Any) -> None:
            """Takes what it is given."""

        def find_weights(self, refs: Any, _: Any) -> Any:
            return refs

        def find_scale(self, control: Any) -> Any:
            return (control,)

        def merge(self, refs: Any, _: Any, found: Any) -> Any:
            return Done(f"merge of {refs} with {found}").result()

        def scale_control(self, control: Any, found: Any) -> Any:
            return self.merge((control,), None, found)

    copies = [Done("copy 0"), Done("copy 1")]
    given = SimpleNamespace(imported_copies=list, control=lambda: Done("control"), copies=lambda: copies)
    stand_ins = {
        "obtain_pretrained": SimpleNamespace(submit=lambda: Done("theta_0", num_train_timesteps=1000)),
        "encode_dataset": lambda *_: None,
        "Trainings": lambda *_: given,
        "heldout_loss": SimpleNamespace(submit=submit_loss),
        "first_real_features": lambda _, part: Done(part),
        "submit_reference": lambda _, part, first: Done(f"{part} {first.ref}"),
        "submit_row": submit_row,
        "CheckJob": lambda **_: None,
        "check_model": lambda _: None,
        "judge_experts": lambda _, refs, *__: [SimpleNamespace(ref=ref, merged=True) for ref in refs],
        "MergePlan": Plan,
        "import_matplotlib": lambda: None,
        "as_completed": list,
        "write_report": lambda results, **_: results,
        "flow_run": SimpleNamespace(id="run"),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(decouple_then_merge, name, stand_in)
    results: Any = decouple_then_merge._compare_rows(load_recipe("digits", ["segments={count: 2}"]))
    merged, scaled = (f"merge of {refs} with {refs}" for refs in (("copy 0", "copy 1"), ("control",)))
    models = {"pretrained": "theta_0", "finetuned": scaled, "merged": merged}
    alone = {row: ((model,), None, "report report") for row, model in models.items()}
    assert rows == alone | {"ensemble": (("copy 0", "copy 1"), (0, 500, 1000), "report report")}
    assert losses == models | {"segment 0": "copy 0", "segment 1": "copy 1"}
    assert {row: model.ref for row, model in results.models.items()} == models
    trained = ("finetuned", "control"), ("segment 0 [0, 500)", "copy 0"), ("segment 1 [500, 1000)", "copy 1")
    assert {name: training.ref for name, training in results.trainings.items()} == dict(trained)


def test_the_control_takes_all_timesteps_and_the_steps_of_all_other_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "finetune", SimpleNamespace(submit=lambda job, _: job))
    recipe = load_recipe("digits", ["finetune.num_steps=7", "distill={num_steps: 5, batch_size: 64}"])
    ref, segments = (
        ArtifactRef("file:///store/pretrained/a", "a"),
        (TimestepSegment(0, 300), TimestepSegment(300, 1000)),
    )
    given = trainings.Trainings(recipe, ref, EncodedDataset(), segments)
    jobs: list[Any] = [given.control(), *given.copies()]
    assert [(job.low, job.high, job.num_steps) for job in jobs] == [(0, 1000, 19), (0, 300, 7), (300, 1000, 7)]


def test_a_copy_of_weights_that_are_no_more_is_refused() -> None:
    def result(name: str, **metrics: Any) -> JobResult:
        return JobResult(ArtifactRef(f"file:///store/{name}", name), metrics, cached=True, seconds=0, storage_seconds=0)

    remade = result("pretrained", weights_digest="new")
    copies = [result("elsewhere"), result("made since", pretrained_weights="new")]
    trainings.check_base(remade, copies)
    with pytest.raises(InputError, match="store/stale was finetuned from other weights"):
        trainings.check_base(remade, [*copies, result("stale", pretrained_weights="lost")])


def test_each_image_of_each_seed_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_evaluation, "generated_features", SimpleNamespace(submit=lambda _, job: job))
    monkeypatch.setattr(row_evaluation, "evaluate_row", SimpleNamespace(submit=lambda *given: given))
    monkeypatch.setattr(row_evaluation, "allow_failure", lambda features: features)
    settings = ["evaluate={num_images: 10, batch_size: 4, seeds: [4, 5, 6]}", "execution.images_per_task=4"]
    ref = ArtifactRef("file:///store/merged/a", "a")
    given: Any = row_evaluation.submit_row(load_recipe("digits", settings), "merged", (ref,), None, ref)
    _, images, features, _ = given
    assert [each.seed for each in images] == [4, 5, 6]
    made = [[(job.images, job.low, job.high) for job in slices] for slices in features]
    assert made == [[(each, 0, 4), (each, 4, 8), (each, 8, 10)] for each in images]


def test_all_real_images_are_looked_at_and_none_is_set_aside_without_a_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(row_evaluation, "real_features", SimpleNamespace(submit=lambda job: job))
    monkeypatch.setattr(row_evaluation, "build_reference", SimpleNamespace(submit=lambda *given: given))
    monkeypatch.setattr(row_evaluation, "allow_failure", lambda features: features)
    fixed = ["segments={count: 2}", "merge={weights: [0.2, 0.3]}"]
    for settings, num_for_search in (([], 600), (fixed, 0)):
        recipe = load_recipe("digits", settings)
        first: Any = row_evaluation.first_real_features(recipe, "report")
        result: Any = SimpleNamespace(metrics={"num_in_all": 2 * first.high + 1})
        given: Any = row_evaluation.submit_reference(recipe, "report", result)
        _, told, (_, *others) = given
        assert [job.low for job in others] == [first.high, 2 * first.high]
        assert {told, *(job.num_for_search for job in (first, *others))} == {num_for_search}


def test_all_images_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(job: Any) -> Done:
        return Done(f"{job.stage} {job.low}", num_in_all=2 * job.high + 1 if job.low == 0 else 0)

    monkeypatch.setattr(encodings, "encode", SimpleNamespace(submit=submit))
    pretrained: Any = SimpleNamespace(
        ref=ArtifactRef("file:///store/pretrained/a", "a"), metrics={"caches": ["latents"]}
    )
    encoded = encodings.encode_dataset(load_recipe("digits", ["execution.images_per_task=64"]), pretrained)
    assert encoded.latents == ("latents 0", "latents 64", "latents 128")


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
