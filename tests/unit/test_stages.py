"""The Prefect tasks of stages: what they try again, and what theta_0 is."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.states import Completed, Failed

from deme_core.errors import (
    DemeError,
    InputError,
    NoAnswerError,
    RunEndedError,
    StoreUnavailableError,
    WorkerDiedError,
)
from deme_core.recipe_file import load_recipe
from tasks.jobs import ImportJob, PretrainJob, pretrained_job
from tasks.progress import subscribe
from tasks.runtime import Runtime
from tasks.stages import _is_passing, _is_store_away


@pytest.mark.parametrize(
    ("error", "is_passing", "is_store_away"),
    [
        (StoreUnavailableError("away"), True, True),
        (NoAnswerError("silent"), True, True),
        (WorkerDiedError("killed"), True, False),
        (InputError("a wrong recipe"), False, False),
        (DemeError("a wrong state"), False, False),
        (ValueError("a mistake of ours"), False, False),
        (KeyError("another one"), False, False),
    ],
    ids=repr,
)
def test_only_what_may_pass_by_itself_is_tried_again(error: Exception, is_passing: bool, is_store_away: bool) -> None:
    state = Failed(data=error)
    assert (_is_passing(None, None, state), _is_store_away(None, None, state)) == (is_passing, is_store_away)


def test_what_succeeded_is_not_tried_again() -> None:
    assert not _is_passing(None, None, Completed(data=1))


def test_a_model_is_pretrained_as_all_of_its_recipe_says() -> None:
    recipe = load_recipe("cifar10_text_tiny", ["dataset.path=/images"])
    job = pretrained_job(recipe)
    assert isinstance(job, PretrainJob)
    assert recipe.pretrained.text_encoder
    asked = recipe.pretrained.model_dump(include={"unet", "noise_scheduler", "training", "text_encoder"})
    assert job.model_dump(include=set(asked)) == asked


def test_a_model_that_is_there_is_imported_as_the_recipe_says() -> None:
    source = {"source": "a/model", "revision": "v1", "allow_pickle": True}
    job = pretrained_job(load_recipe("digits", [f"pretrained={json.dumps(source)}"]))
    assert isinstance(job, ImportJob)
    assert job.model_dump() == source


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (RunEndedError(), "stopped", "KILLED"),
        (KeyboardInterrupt(), "stopped", "KILLED"),
        (WorkerDiedError("killed"), "failed", "FAILED"),
        (InputError("a wrong recipe"), "failed", "FAILED"),
    ],
    ids=repr,
)
def test_what_the_end_of_its_run_stopped_has_not_failed(error: BaseException, kind: str, status: str) -> None:
    told: list[str] = []
    ended: list[str] = []
    runtime: Any = SimpleNamespace(tracker=SimpleNamespace(finish=lambda _, status: ended.append(status)))

    def work(*_: Any) -> Any:
        raise error

    unsubscribe = subscribe(lambda event: told.append(event.kind))
    try:
        with pytest.raises(type(error)):
            Runtime.follow(runtime, work, task="finetune segment 0", child="run")
    finally:
        unsubscribe()
    assert (told, ended) == ([kind], [status])
