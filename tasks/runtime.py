"""The runtime of a flow run: its workers, its tracker, and how a task has a job done."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deme_core.artifacts import ArtifactStore, fetch_or_withdraw
from deme_core.errors import RunEndedError, TrackingUnavailableError
from deme_core.manifest import ArtifactRef
from deme_core.recipe import Recipe
from deme_core.settings import Settings
from tasks.jobs import Job, JobResult
from tasks.progress import Event, Record, Report, tell
from tasks.timing import Timing
from tasks.tracking import Tracker


class Pool(Protocol):
    """Has jobs done somewhere: `WorkerPool`, `RemotePool` or `RayPool`, each in a module of its name."""

    def start(self) -> None:
        """Gets ready for the first job."""

    def run(self, job: Job, report: Report, *, on_start: Callable[[], None]) -> JobResult:
        """Does ``job``, reporting its progress, and returns its result."""

    def close(self) -> None:
        """Ends all jobs and takes no more."""


@dataclass
class Runtime:
    """What the tasks of one flow run share.

    Attributes:
        recipe: what is done.
        settings: of this machine.
        artifacts: what is there already.
        pool: does jobs.
        opening: the tracker, as soon as MLflow knows the flow's run.
        timing: what took how long.
    """

    recipe: Recipe
    settings: Settings
    artifacts: ArtifactStore
    pool: Pool
    opening: Future[Tracker]
    timing: Timing

    @property
    def tracker(self) -> Tracker:
        """The flow's run in MLflow; waits until there is one, or raises why there is none."""
        return self.opening.result()

    def fetch(self, ref: ArtifactRef) -> Path:
        """Returns a local, verified folder with the artifact's files.

        Raises:
            DamagedArtifactError: they are not what they were; the next run makes the artifact anew.
        """
        return fetch_or_withdraw(self.artifacts, ref)

    def do(self, job: Job, report: Report = lambda _: None, on_start: Callable[[], None] = lambda: None) -> JobResult:
        """Has ``job`` done by the pool and notes the time it took, without telling listeners."""
        began = time.perf_counter()

        def start() -> None:
            nonlocal began
            began = time.perf_counter()
            on_start()

        result = self.pool.run(job, report, on_start=start)
        self.timing.add(job, began, result)
        return result

    def run(self, job: Job, *, task: str, child: str | None = None, on_record: Report = lambda _: None) -> JobResult:
        """Has ``job`` done, telling listeners how it goes.

        Args:
            job: what to do.
            task: name for listeners.
            child: id of the MLflow run to tag with the outcome.
            on_record: called with every progress record.
        """

        def work(pass_on: Report, start: Callable[[], None]) -> JobResult:
            def report(record: Record) -> None:
                pass_on(record)
                on_record(record)

            return self.do(job, report, start)

        return self.follow(work, task=task, child=child)

    def follow(
        self, work: Callable[[Report, Callable[[], None]], JobResult], *, task: str, child: str | None = None
    ) -> JobResult:
        """Returns the result of ``work``, telling listeners how it goes, and MLflow how it ended.

        Args:
            work: is given what takes progress records, and what to call when it begins.
            task: name for listeners.
            child: id of the MLflow run to tag with the outcome.
        """
        with self.ended_by_failure(child):
            try:
                result = work(
                    lambda record: tell(Event(task, "progress", record)), lambda: tell(Event(task, "started"))
                )
            except BaseException as error:
                tell(Event(task, "stopped" if was_stopped(error) else "failed"))
                raise
        tell(Event(task, "cached" if result.cached else "finished", {"seconds": result.seconds}))
        if child:
            self.note_results(child, result)
        return result

    @contextlib.contextmanager
    def ended_by_failure(self, child: str | None) -> Iterator[None]:
        """Ends a child run, if there is one, as FAILED or KILLED when what it stands for raises within."""
        try:
            yield
        except BaseException as error:
            if child:
                with contextlib.suppress(TrackingUnavailableError):  # What failed before is what must be told.
                    self.tracker.finish(child, "KILLED" if was_stopped(error) else "FAILED")
            raise

    def note_results(self, child: str, *results: JobResult) -> None:
        """Tells MLflow what the jobs of a child run have made.

        Of several it says what is true of all: cached if each was, and the seconds of all together. Where an artifact
        lies it says of a single job alone.
        """
        tags = {
            "deme.cached": str(all(result.cached for result in results)).lower(),
            "deme.seconds": round(sum(result.seconds for result in results), 2),
        }
        if len(results) == 1:
            tags |= {"deme.uri": results[0].ref.uri, "deme.digest": results[0].ref.digest}
        self.tracker.set_tags(child, tags)


_current: ContextVar[Runtime] = ContextVar("deme_runtime")


def current_runtime() -> Runtime:
    """Returns the runtime of the flow run this task belongs to."""
    return _current.get()


@contextlib.contextmanager
def use_runtime(runtime: Runtime) -> Iterator[Runtime]:
    """Makes ``runtime`` the current one, for this thread and the task threads Prefect starts from it."""
    token = _current.set(runtime)
    try:
        yield runtime
    finally:
        _current.reset(token)


def was_stopped(error: BaseException) -> bool:
    """Whether what ended a job is the end of its run: Ctrl-C, SIGTERM, a cancellation, or another job that failed."""
    return isinstance(error, RunEndedError) or not isinstance(error, Exception)
