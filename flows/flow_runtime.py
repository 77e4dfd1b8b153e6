"""What a flow run needs while it runs: workers, store and tracker, started together and stopped together."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Literal

from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from deme_core.artifacts import ArtifactStore
from deme_core.prompts import load_prompts
from deme_core.recipe import Recipe
from deme_core.recipe_file import dump_recipe, flatten
from deme_core.settings import Settings
from deme_core.store import check_access, open_store
from flows.environment import make_folders
from tasks.live_runs import killed_runs, live_run
from tasks.ray_pool import RayPool
from tasks.remote_pool import RemotePool
from tasks.runtime import Pool, Runtime, use_runtime
from tasks.slots import plan_slots
from tasks.timing import Timing
from tasks.tracked_runs import check_tracking
from tasks.tracking import Tracker
from tasks.worker_pool import WorkerPool

# What a run that fails at its start gives MLflow, so that it hears of the failure.
_SECONDS_TO_OPEN = 10.0

# Workers that started before the flow that needs them, and what they have said meanwhile.
_ahead: list[tuple[WorkerPool, list[str]]] = []

# Before any flow starts: a local Prefect server cannot make its own folder's parents.
make_folders()


@contextlib.contextmanager
def workers_ahead(recipe: Recipe) -> Iterator[None]:
    """Starts the workers of this machine for the flow that begins within, while something else is waited for.

    Raises:
        InputError: there cannot be any, such as without a GPU.
    """
    if recipe.execution.runner != "local":
        yield
        return
    said = list[str]()
    pool = WorkerPool(plan_slots(recipe.execution, *recipe.process_counts), said.append)
    with contextlib.closing(pool):
        pool.start()
        _ahead.append((pool, said))
        try:
            yield
        finally:
            _ahead.clear()


@contextlib.contextmanager
def flow_runtime(recipe: Recipe) -> Iterator[Runtime]:
    """Gives the runtime of a flow run, with its MLflow parent run, which ends as the flow run does.

    Raises:
        StoreUnavailableError: the object store cannot be used; said before any work starts.
        PromptsError: the recipe's prompts cannot be read.
    """
    timing, settings, logger = Timing(), Settings(), get_run_logger()
    store = open_store(settings.store_uri)
    pool: Pool
    if recipe.execution.runner == "prefect":
        pool = RemotePool(recipe.execution, store, str(flow_run.id))
    elif recipe.execution.runner == "ray":
        pool = RayPool(recipe.execution, settings, store)
    else:
        pool, said = _ahead.pop() if _ahead else (WorkerPool(plan_slots(recipe.execution, *recipe.process_counts)), [])
        pool.log = lambda line: logger.info("worker: %s", line)
        for line in said:
            pool.log(line)
    try:
        pool.start()  # First, since the imports of the workers take longest.
        check_access(store)
        check_tracking(settings)
        if recipe.evaluate.prompts and recipe.execution.runner == "local":  # Else the path is one of the workers'.
            load_prompts(recipe.evaluate.prompts, settings.cache_folder)
        artifacts = ArtifactStore(store, settings.cache_folder)
        with live_run(settings, str(flow_run.id)):
            opening = _open_tracker(settings, recipe, str(flow_run.id))
            runtime = Runtime(recipe, settings, artifacts, pool, opening, timing)
            # Trainings leave their checkpoints before MLflow is told anything: whoever ends this run may be in a hurry.
            with _tracked(opening), use_runtime(runtime), contextlib.closing(pool):
                yield runtime
    finally:
        pool.close()


def _open_tracker(settings: Settings, recipe: Recipe, flow_run_id: str) -> Future[Tracker]:
    """Starts the flow's run in MLflow, beside the first jobs: the import and the requests take seconds."""
    opening: Future[Tracker] = Future()

    def open_tracker() -> None:
        try:
            tracker = Tracker(settings, experiment=recipe.name, run_name=recipe.name, flow_run_id=flow_run_id)
            tracker.log_params(tracker.run_id, flatten(recipe.model_dump(mode="json")))
            tracker.log_text(tracker.run_id, dump_recipe(recipe), "recipe.yaml")
            with contextlib.suppress(
                Exception
            ):  # What became of other runs must not fail this one; the next tries again.
                for killed in killed_runs(settings):
                    tracker.end_killed(killed)
        except BaseException as error:
            opening.set_exception(error)
        else:
            opening.set_result(tracker)

    # A daemon, since nothing shall keep a process from ending that has lost its server.
    threading.Thread(target=open_tracker, name="opening the tracker", daemon=True).start()
    return opening


@contextlib.contextmanager
def _tracked(opening: Future[Tracker]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # Ctrl-C, SIGTERM and a cancellation are no exceptions of the work.
        status: Literal["FAILED", "KILLED"] = "FAILED" if isinstance(error, Exception) else "KILLED"
        with contextlib.suppress(Exception):  # What failed before is what must be told.
            opening.result(timeout=_SECONDS_TO_OPEN).finish_flow(status)
        raise
    opening.result().finish_flow("FINISHED")
