"""The tasks of a search on a real Prefect server: its candidates are tasks of their own, under way together."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.task_runners import ThreadPoolTaskRunner

from deme_core.artifacts import ArtifactStore
from deme_core.errors import WorkerDiedError
from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, EvaluateSpec, MethodSpec, SearchSpec
from deme_core.recipe_file import load_recipe
from deme_core.settings import Settings
from deme_core.store import open_store
from tasks.jobs import Job, JobResult, ScoreJob, SearchJob
from tasks.progress import Report
from tasks.runtime import Runtime, use_runtime
from tasks.stages import search
from tasks.timing import Timing
from tasks.tracking import Tracker

NUM_CANDIDATES = 4


class MeetingPool:
    """Lets a score be done only when all of its batch are under way; the first two jobs lose their worker."""

    def __init__(self, artifacts: ArtifactStore, folder: Path) -> None:
        self._artifacts, self._folder = artifacts, folder
        self._meeting, self._lock = threading.Barrier(NUM_CANDIDATES), threading.Lock()
        self._to_die = [SearchJob, ScoreJob]

    def start(self) -> None:
        """There is no process to start."""

    def close(self) -> None:
        """There is no process to end."""

    def run(self, job: Job, report: Report, *, on_start: Callable[[], None]) -> JobResult:
        on_start()
        with self._lock:
            if type(job) in self._to_die:
                self._to_die.remove(type(job))
                raise WorkerDiedError("killed")
        metrics: dict[str, Any] = {"num_weights": 2}
        if isinstance(job, ScoreJob):
            self._meeting.wait(timeout=60)
            metrics = {"value": 1.0 - sum(job.weights)}
        digest = "-".join(["d", *(f"{w:g}" for w in getattr(job, "weights", ()))])
        ref, _ = self._artifacts.publish(job.stage, digest, self._folder, settings={}, inputs={}, metrics=metrics)
        return JobResult(ref, metrics, False, 0.0, 0.0)


def test_all_candidates_of_a_batch_are_under_way_at_once_and_each_is_tried_again(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEME_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DEME_STORE_URI", raising=False)
    (tmp_path / "empty").mkdir()
    settings = Settings()
    artifacts = ArtifactStore(open_store(settings.store_uri), settings.cache_folder)
    opening: Future[Tracker] = Future()
    opening.set_result(Tracker(settings, experiment="search", run_name="search", flow_run_id="flow"))
    ref = ArtifactRef(f"{settings.store_uri}/pretrained/x", "x")
    job = SearchJob(
        pretrained=ref,
        experts=(ref, ref),
        method=MethodSpec(),
        segment_edges=(0, 500, 1000),
        is_control=False,
        search=SearchSpec(strategy="grid", values=(0.0, 0.5)),
        evaluate=EvaluateSpec(num_images=4),
        dataset=DatasetSpec(source="digits"),
        reference=ref,
    )

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=NUM_CANDIDATES + 1))  # type: ignore[arg-type]
    def searching() -> dict[str, Any]:
        pool = MeetingPool(artifacts, tmp_path / "empty")
        runtime = Runtime(load_recipe("digits", ()), settings, artifacts, pool, opening, Timing())
        with use_runtime(runtime):
            result = search.submit(job, "merge weights").result()
            return {**result.metrics, "seconds": runtime.timing.seconds()}

    found = searching()
    assert (found["weights"], found["num_images"]) == ([0.5, 0.5], NUM_CANDIDATES * job.search.num_images)
    assert {"problem", "search"} <= set(found["seconds"])
    with get_client(sync_client=True) as client:
        mine = FlowFilter(name=FlowFilterName(any_=[searching.name]))
        names = {task_run.name: task_run.run_count for task_run in client.read_task_runs(flow_filter=mine)}
    assert {"search merge weights", "merge weights: problem", "merge weights: full score of 0.5, 0.5"} <= set(names)
    assert sorted(names.values()) == [1] * NUM_CANDIDATES + [2, 2]
