"""The remote pool: each job is a flow run of its own, on whatever machine serves the work pool it is sent to.

The counterpart of `tasks.worker_pool` for recipes with ``execution.runner: prefect``. A job travels as the parameters
of the flow run, its outcome as JSON through the object store. So a worker first looks for an object that the flow put
there: with another store, by the same name perhaps, it would work for hours, and its outcome would never be seen.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any
from uuid import UUID, uuid4

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from deme_core.errors import ArtifactNotFoundError, DemeError, InputError, WorkerDiedError
from deme_core.recipe import ExecutionSpec
from deme_core.store import ObjectStore
from tasks.error_messages import job_error
from tasks.health import check_api_address
from tasks.jobs import Job, JobResult
from tasks.worker_pool import Report

_POLL_SECONDS = 2.0


def outcome_key(flow_run_id: str) -> str:
    """Returns the object that holds the outcome of a job's flow run."""
    return f"jobs/{flow_run_id}.json"


def check_worker(store: ObjectStore, flow_object: str) -> None:
    """Checks on a worker that it is of the flow's version and uses its store.

    Args:
        store: the worker's.
        flow_object: what the flow put into its own.

    Raises:
        InputError: either is another one.
    """
    try:
        expected = store.get_bytes(flow_object).decode()
    except ArtifactNotFoundError as error:
        raise InputError(
            f"The object store of this worker, {store.place}, is not that of the run which sent the job; give both the "
            "same DEME_STORE_URI and AWS_ENDPOINT_URL."
        ) from error
    if expected != version("deme"):
        raise InputError(f"This worker has DeMe {version('deme')}, the run which sent the job {expected}.")


class RemotePool:
    """Sends jobs to work pools; safe to use from many threads.

    Args:
        execution: says which stages go to the GPU pool.
        store: where outcomes are left.
    """

    def __init__(self, execution: ExecutionSpec, store: ObjectStore) -> None:
        self._gpu_stages, self._store = set(execution.gpu_stages), store
        self._flow_object = f"jobs/flow-{uuid4().hex}"
        self._running: set[UUID] = set()
        self._closed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Checks that the server knows the deployments of jobs, and leaves in the store what workers look for.

        Raises:
            InputError: it does not, or its address holds a password.
        """
        with get_client(sync_client=True) as client:
            check_api_address(str(client.api_url))
            for name in ("deme-job/cpu", *(["deme-job/gpu"] if self._gpu_stages else [])):
                try:
                    client.read_deployment_by_name(name)
                except ObjectNotFound as error:
                    raise InputError(
                        f"execution.runner is prefect, but {client.api_url} has no deployment {name}; `deme deploy` "
                        "registers it, or set execution.runner to local."
                    ) from error
        self._store.put_bytes(self._flow_object, version("deme").encode())

    def run(self, job: Job, report: Report, *, on_start: Callable[[], None] = lambda: None) -> JobResult:
        """Has ``job`` done by a worker of its pool and returns its result.

        Args:
            job: what to do.
            report: called when the job waits; its progress is shown by its own flow run.
            on_start: called when a worker begins.

        Raises:
            DemeError: the job failed; of the class it failed with, where DeMe foresaw it.
            WorkerDiedError: its flow run ended without an outcome.
        """
        name = "deme-job/gpu" if job.stage in self._gpu_stages else "deme-job/cpu"
        with get_client(sync_client=True) as client:
            flow_run = client.create_flow_run_from_deployment(
                client.read_deployment_by_name(name).id,
                parameters={
                    "kind": type(job).__name__,
                    "content": job.model_dump(mode="json"),
                    "flow_object": self._flow_object,
                },
            )
            report({"message": f"flow run {flow_run.name} of {name}"})
            with self._lock:
                self._running.add(flow_run.id)
            try:
                return self._wait(client, flow_run.id, on_start)
            finally:
                with self._lock:
                    self._running.discard(flow_run.id)

    def _wait(self, client: SyncPrefectClient, flow_run_id: UUID, on_start: Callable[[], None]) -> JobResult:
        started = False
        while True:
            state = client.read_flow_run(flow_run_id).state
            if state is not None and state.is_running() and not started:
                started = True
                on_start()
            if state is not None and state.is_final():
                return self._outcome(str(flow_run_id), state)
            time.sleep(_POLL_SECONDS)

    def _outcome(self, flow_run_id: str, state: State) -> JobResult:
        try:
            outcome: dict[str, Any] = json.loads(self._store.get_bytes(outcome_key(flow_run_id)))
        except ArtifactNotFoundError as error:
            if self._closed:  # It did not die, it was cancelled: nobody shall try again.
                raise DemeError("The flow run ended before the job did.") from error
            reason = state.message or "no reason given"
            if state.is_failed():  # It ended in an error that it could not leave here.
                raise DemeError(f"Flow run {flow_run_id} of a job failed: {reason}") from error
            raise WorkerDiedError(
                f"Flow run {flow_run_id} of a job ended before the job was done ({state.name}: {reason}); run again to "
                "go on from the last checkpoint."
            ) from error
        self._store.delete(outcome_key(flow_run_id))
        if "result" in outcome:
            return JobResult.from_dict(outcome["result"])
        raise job_error(outcome)

    def close(self) -> None:
        """Cancels what still runs."""
        self._closed = True
        with contextlib.suppress(DemeError):
            self._store.delete(self._flow_object)
        with self._lock:
            running = set(self._running)
        if running:
            with get_client(sync_client=True) as client:
                for flow_run_id in running:
                    with contextlib.suppress(DemeError, ObjectNotFound):
                        client.set_flow_run_state(flow_run_id, Cancelling())
