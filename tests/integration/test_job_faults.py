"""What jobs do when something breaks: nothing is lost, and the run that follows ends with the same artifacts."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, tzinfo
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deme_core import artifacts as artifacts_module
from deme_core.artifacts import ArtifactStore
from deme_core.errors import DamagedArtifactError, StoreUnavailableError, WorkerStoppedError
from deme_core.manifest import ArtifactRef
from tasks.jobs import FinetuneJob, Job, JobResult
from tasks.progress import Record, Report
from tasks.work.base import JobContext, checkpoint_stage, execute
from tests.small_run import (
    check_cache,
    check_nothing_is_left,
    contents,
    finetune_job,
    in_child,
    layout,
    make_context,
    pretrain_job,
    run_all,
)
from tests.unit.test_store import small_disk

__all__ = ["small_disk"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    context = make_context(tmp_path_factory.mktemp("undisturbed"))
    run_all(context)
    return context.artifacts


def _computed(context: JobContext) -> list[str]:
    """Runs all jobs; returns the stages of those that were not in the store."""
    stages: list[str] = []

    def note(job: Job, result: JobResult) -> None:
        if not result.cached:
            stages.append(job.stage)

    run_all(context, note)
    return stages


def _flip_a_bit(artifacts: ArtifactStore, key: str) -> None:
    data = bytearray(artifacts.store.get_bytes(key))
    data[len(data) // 2] ^= 1
    artifacts.store.put_bytes(key, bytes(data))


def test_a_flipped_bit_is_named_and_the_next_run_makes_that_artifact_anew(
    undisturbed: ArtifactStore, tmp_path: Path
) -> None:
    run_all(make_context(tmp_path / "home"))
    other = make_context(tmp_path / "other machine", (tmp_path / "home" / "store").as_uri())
    (copy, _) = other.artifacts.list_refs("finetune")
    (merged,) = other.artifacts.list_refs("merged")
    other.artifacts.remove(merged)
    weights = next(f for f in other.artifacts.manifest(copy).files if f.name.endswith(".safetensors"))
    _flip_a_bit(other.artifacts, weights.key)
    with pytest.raises(DamagedArtifactError, match=f"{weights.key} holds .* run again, which makes it anew"):
        run_all(other)
    assert _computed(other) == ["finetune", "merged"]
    assert contents(other.artifacts) == contents(undisturbed)
    check_nothing_is_left(other.artifacts, layout(undisturbed))


def test_a_manifest_that_is_damaged_is_made_anew_at_once(undisturbed: ArtifactStore, tmp_path: Path) -> None:
    context = make_context(tmp_path)
    run_all(context)
    (pretrained,) = context.artifacts.list_refs("pretrained")
    context.artifacts.store.put_bytes(f"pretrained/{pretrained.digest}/manifest.json", b'{"stage": "pre')
    assert _computed(make_context(tmp_path)) == ["pretrained"]
    assert contents(context.artifacts) == contents(undisturbed)


class InterruptedHereError(Exception):
    """Raised by a listener in the middle of a job."""


def _interrupted_at(step: int) -> Report:
    def report(record: dict[str, Any]) -> None:
        if record.get("global_step") == step:
            raise InterruptedHereError

    return report


def _interrupted_finetuning(context: JobContext) -> FinetuneJob:
    """Returns the job of a finetuning that left its checkpoints of steps 2 and 4."""
    pretrained = execute(pretrain_job(), context, lambda _: None)
    job = finetune_job(pretrained, 0, num_steps=8, checkpoint_every=2)
    with pytest.raises(InterruptedHereError):
        execute(job, context, _interrupted_at(6))
    return job


def test_a_resumed_training_kept_its_newest_checkpoints_and_tells_all_of_its_steps(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    pretrained = execute(pretrain_job(), context, lambda _: None)
    job = finetune_job(pretrained, 0, num_steps=8, checkpoint_every=2)
    with pytest.raises(InterruptedHereError):
        execute(job, context, _interrupted_at(8))
    (stage,) = {"/".join(item.key.split("/")[:2]) for item in context.artifacts.store.list("checkpoints/")}
    assert [ref.digest for ref in context.artifacts.list_refs(stage)] == ["step-00000004", "step-00000006"]
    result = execute(job, context, lambda _: None)
    assert [record["global_step"] for record in result.metrics["history"]] == [2, 4, 6, 8]


@pytest.mark.parametrize("damage", ["flipped", "lost"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: str, undisturbed: ArtifactStore, tmp_path: Path
) -> None:
    context = make_context(tmp_path)
    job = _interrupted_finetuning(context)
    (stage,) = {"/".join(item.key.split("/")[:2]) for item in context.artifacts.store.list("checkpoints/")}
    steps = context.artifacts.list_refs(stage)
    assert [ref.digest for ref in steps] == ["step-00000002", "step-00000004"]
    key = context.artifacts.manifest(steps[1]).files[1].key
    if damage == "flipped":
        _flip_a_bit(context.artifacts, key)
    else:
        context.artifacts.store.delete(key)
    messages: list[str] = []
    result = execute(job, context, lambda record: messages.append(record.get("message", "")))
    told = [message for message in messages if message]
    assert len(told) == 2 and "step-00000004" in told[0] and told[1] == "resumed at step 2"
    assert checkpoint_stage(result.ref.digest) == stage
    resumed = contents(context.artifacts)
    context.artifacts.remove(result.ref)
    assert not execute(job, context, lambda _: None).cached
    assert contents(context.artifacts) == resumed


def test_checkpoints_that_another_machine_removes_while_they_are_looked_at_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(tmp_path)
    job = _interrupted_finetuning(context)
    find_newest = ArtifactStore.newest

    def newest_before_all_go(artifacts: ArtifactStore, stage: str) -> ArtifactRef | None:
        found = find_newest(artifacts, stage)
        for ref in artifacts.list_refs(stage):
            artifacts.remove(ref)
        return found

    monkeypatch.setattr(ArtifactStore, "newest", newest_before_all_go)
    messages: list[str] = []
    assert not execute(job, context, lambda record: messages.append(record.get("message", ""))).cached
    assert not any("resumed" in message for message in messages)


def test_a_training_that_is_told_to_stop_leaves_a_checkpoint_of_that_step(
    undisturbed: ArtifactStore, tmp_path: Path
) -> None:
    context = make_context(tmp_path)
    pretrained = execute(pretrain_job(), context, lambda _: None)
    job = finetune_job(pretrained, 0)

    def stop_at_once(record: dict[str, Any]) -> None:
        # The first record comes at the third step, where a checkpoint is due anyway; the next stop is at the fourth.
        if record.get("global_step") == 3:
            context.stop.set()

    with pytest.raises(WorkerStoppedError, match="checkpoint at step 3") as stopped:
        execute(job, context, stop_at_once)
    assert stopped.value.global_step == 3
    with pytest.raises(WorkerStoppedError, match="checkpoint at step 4"):
        execute(job, context, lambda _: None)  # Still told to: each step is its last.
    context.stop.clear()
    messages = list[Any]()
    execute(job, context, messages.append)
    assert {"message": "resumed at step 4"} in messages
    run_all(context)
    assert contents(context.artifacts) == contents(undisturbed)


def test_of_two_runs_on_one_machine_one_computes_and_the_other_waits(
    undisturbed: ArtifactStore, tmp_path: Path
) -> None:
    _run_at_once([partial(_note_computed, tmp_path / name, tmp_path / "home") for name in ("a", "b")])
    computed = [(tmp_path / name).read_text().split() for name in ("a", "b")]
    assert sorted(computed[0] + computed[1]) == ["finetune", "finetune", "merged", "pretrained"]
    assert contents(make_context(tmp_path / "home").artifacts) == contents(undisturbed)


def test_of_two_runs_on_two_machines_the_first_to_finish_is_kept(undisturbed: ArtifactStore, tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    _run_at_once([partial(_note_computed, tmp_path / name, tmp_path / f"home-{name}", store) for name in ("a", "b")])
    for name in ("a", "b"):
        artifacts = make_context(tmp_path / f"home-{name}", store).artifacts
        assert contents(artifacts) == contents(undisturbed)
        check_cache(artifacts, contents(undisturbed))
    check_nothing_is_left(artifacts, layout(undisturbed))


def _note_computed(note: Path, home: Path, store: str | None = None) -> None:
    note.write_text("\n".join(_computed(make_context(home, store))))


def _run_at_once(acts: list[Callable[[], None]]) -> None:
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda act: statuses.append(in_child(act)), args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0, 0]


def test_a_clock_that_jumps_changes_nothing(
    undisturbed: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.fromtimestamp(rng.uniform(0, 4e9), tz or UTC)

    monkeypatch.setattr(artifacts_module, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(0, 4e9))
    context = make_context(tmp_path)
    assert _computed(context) == ["pretrained", "finetune", "finetune", "merged"]
    assert _computed(make_context(tmp_path)) == []
    assert contents(context.artifacts) == contents(undisturbed)


def test_a_disk_that_fills_up_is_said_and_loses_nothing(
    undisturbed: ArtifactStore, small_disk: Path, tmp_path: Path
) -> None:
    """State folder and store on one disk that is filled to the brim, with less and less left of it."""
    expected, num_failures = contents(undisturbed), 0
    filler = small_disk / "filler"
    for kilobytes in (980, 940, 900, 860, 820, 780, 700, 600, 0):
        filler.unlink(missing_ok=True)
        _fill(filler, kilobytes)
        context = make_context(small_disk / "home")
        try:
            run_all(context)
        except StoreUnavailableError as error:
            assert "No space left" in str(error) or "free space" in str(error), error
            num_failures += 1
        filler.unlink(missing_ok=True)
        visible = contents(context.artifacts)
        check_cache(context.artifacts, visible)
        assert {k: v for k, v in visible.items() if k in expected}.items() <= expected.items()
    assert num_failures >= 2
    assert visible == expected
    check_nothing_is_left(context.artifacts, layout(undisturbed))


def _fill(filler: Path, kilobytes: int) -> None:
    try:
        with filler.open("wb", buffering=0) as file:
            for _ in range(kilobytes):
                file.write(bytes(1024))
    except OSError:
        pass  # What is there already takes the rest.


def test_who_comes_second_tells_what_the_first_one_measured(tmp_path: Path) -> None:
    """Two machines make the same artifact; numbers may differ in the last digits."""
    job = pretrain_job()
    first = make_context(tmp_path / "a", store_uri=(tmp_path / "store").as_uri())
    second = make_context(tmp_path / "b", store_uri=(tmp_path / "store").as_uri())

    def first_is_faster(_: Record) -> None:
        if first.artifacts.list_refs(job.stage):
            return
        made = execute(job, first, lambda _: None)
        first.artifacts.store.put_bytes(
            f"{job.stage}/{made.ref.digest}/manifest.json",
            replace(first.artifacts.manifest(made.ref), metrics=made.metrics | {"machine": "a"}).to_json().encode(),
        )

    result = execute(job, second, first_is_faster)
    assert not result.cached
    assert result.metrics["machine"] == "a"
    assert result.metrics == execute(job, second, lambda _: None).metrics
