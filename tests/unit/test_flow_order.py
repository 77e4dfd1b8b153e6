"""What a flow asks for first, and what it takes from overrides; without Prefect and without work."""

import json
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from deme_core.errors import InputError
from deme_core.manifest import ArtifactRef
from deme_core.recipe_file import load_recipe
from flows import decouple_then_merge, merge_plan
from flows import evaluate as evaluation


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
    trainings = SimpleNamespace(
        control=lambda: Future("control", asked), copies=lambda: [Future("copy", asked)], distillation=None
    )
    stand_ins = {
        "obtain_pretrained": SimpleNamespace(submit=lambda: Obtaining()),
        "encode_dataset": lambda *_: None,
        "Trainings": lambda *_: trainings,
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
    plan.find_weights((ref, ref), experts, "merge weights")
    plan.find_weights((ref,), None, "scale of the control")
    assert [(job.is_control, len(job.experts)) for job in jobs] == [(False, 2), (True, 1)]
    assert jobs[0].search.known_weights == ((0.1, 0.3),)
    assert {job.search.known_scales for job in jobs} == {(0.5,)}
