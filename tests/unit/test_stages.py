"""The Prefect tasks of stages: what they try again, what theta_0 is, and what they tell MLflow."""

import json
from collections.abc import Sequence
from concurrent.futures import Future
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
from deme_core.manifest import ArtifactRef
from deme_core.recipe_file import load_recipe
from tasks.jobs import EvaluateJob, GeneratedImages, ImportJob, JobResult, PretrainJob, pretrained_job
from tasks.progress import subscribe
from tasks.runtime import Runtime, use_runtime
from tasks.stages import _is_passing, _is_store_away, evaluate_row
from tasks.timing import Timing


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


def runtime_of(tracker: Any, **others: Any) -> Runtime:
    """The runtime of a flow run whose MLflow runs ``tracker`` keeps, and which has nothing but ``others``."""
    opening: Future[Any] = Future()
    opening.set_result(tracker)
    lacking: dict[str, Any] = dict.fromkeys(("recipe", "settings", "artifacts", "pool"))
    return Runtime(**(lacking | others), opening=opening, timing=Timing())


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
    runtime = runtime_of(SimpleNamespace(finish=lambda _, status: ended.append(status)))

    def work(*_: Any) -> Any:
        raise error

    unsubscribe = subscribe(lambda event: told.append(event.kind))
    try:
        with pytest.raises(type(error)):
            runtime.follow(work, task="finetune segment 0", child="run")
    finally:
        unsubscribe()
    assert (told, ended) == ([kind], [status])


class Scores:
    """A pool that has the scores of each seed, or an error, and the MLflow run that is told of them."""

    def __init__(self, *answers: JobResult | Exception) -> None:
        self.tags: dict[str, Any] = {}
        self.ended: list[str] = []
        self._answers = answers
        self._runtime = runtime_of(
            SimpleNamespace(
                child=lambda name: name,
                set_tags=lambda _, tags: self.tags.update(tags),
                log_steps=lambda *_: None,
                log_params=lambda *_: None,
                finish=lambda _, status="FINISHED": self.ended.append(status),
            ),
            recipe=load_recipe("digits", []),
            pool=SimpleNamespace(run=self._run),
        )

    def _run(self, job: EvaluateJob, *_: Any, **__: Any) -> JobResult:
        answer = self._answers[job.images.seed]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def evaluate(self, *features: Sequence[JobResult | Exception]) -> None:
        seeds = range(len(self._answers))
        images = [GeneratedImages(models=(REF,), edges=None, seed=seed) for seed in seeds]
        with use_runtime(self._runtime):
            evaluate_row.fn("merged", images, features or [()] * len(images), REF)


REF = ArtifactRef("file:///store/scores/0123", "0123")


def scored(*, cached: bool, seconds: float) -> JobResult:
    return JobResult(REF, {"scores": {"fid": 1.0}}, cached, seconds, 0.0)


@pytest.mark.parametrize(
    ("is_cached", "said"), [((False, True), "false"), ((True, False), "false"), ((True, True), "true")]
)
def test_the_run_of_a_row_says_what_is_true_of_all_its_seeds(is_cached: tuple[bool, bool], said: str) -> None:
    row = Scores(*(scored(cached=cached, seconds=1.25) for cached in is_cached))
    row.evaluate()
    assert row.tags == {"deme.cached": said, "deme.seconds": 2.5}
    assert row.ended == ["FINISHED"]


def test_the_run_of_a_row_with_one_seed_says_where_its_scores_lie() -> None:
    row = Scores(scored(cached=False, seconds=1.0))
    row.evaluate()
    assert row.tags == {"deme.cached": "false", "deme.seconds": 1.0, "deme.uri": REF.uri, "deme.digest": REF.digest}


@pytest.mark.parametrize(("error", "status"), [(InputError("wrong"), "FAILED"), (RunEndedError(), "KILLED")], ids=repr)
def test_the_run_of_a_row_ends_as_its_seeds_or_their_images_do(error: Exception, status: str) -> None:
    row = Scores(scored(cached=False, seconds=1.0), error)
    with pytest.raises(type(error)):
        row.evaluate()
    assert (row.tags, row.ended) == ({}, [status])
    row = Scores(scored(cached=False, seconds=1.0))
    with pytest.raises(type(error)):
        row.evaluate([error])
    assert (row.tags, row.ended) == ({}, [status])
