"""The remote pool: each job is a flow run of its own, on whatever machine serves the work pool it is sent to.

The counterpart of `tasks.worker_pool` for recipes with ``execution.runner: prefect``. A job travels as the parameters
of the flow run, its outcome as JSON through the object store. What the worker of a job asks of the run that sent it is
in `tasks.remote_sender`.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from deme_core.errors import ArtifactNotFoundError, DemeError, InputError, RunEndedError, WorkerDiedError
from deme_core.recipe import ExecutionSpec
from deme_core.store import ObjectStore, check_access
from tasks.error_messages import job_error
from tasks.health import check_api_address
from tasks.jobs import Job, JobResult
from tasks.progress import Report
from tasks.remote_sender import outcome_key, signed

T = TypeVar("T")

_POLL_SECONDS = 2.0
# How long a server may be away; jobs go on meanwhile. Each poll has a minute of the client's own attempts.
_PATIENCE_SECONDS = 1800.0


class RemotePool:
    """Sends jobs to work pools; safe to use from many threads.

    Args:
        execution: says which stages go to the GPU pool, and how many jobs there may be at once.
        store: where outcomes are left.
        flow_run_id: of the flow run that needs the jobs.
    """

    def __init__(self, execution: ExecutionSpec, store: ObjectStore, flow_run_id: str) -> None:
        self._gpu_stages, self._store, self._flow_run_id = set(execution.gpu_stages), store, flow_run_id
        self._device = execution.device
        self._signature = contextlib.ExitStack()
        bound = execution.num_workers
        self._places = threading.BoundedSemaphore(bound) if bound else contextlib.nullcontext()
        self._running: set[UUID] = set()
        self._closed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Checks that the server knows the deployments of jobs, and signs in the store for workers to see.

        Raises:
            InputError: it does not, or its address holds a password.
            StoreUnavailableError: the store cannot be used.
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
        check_access(self._store)
        self._signature.enter_context(signed(self._store, self._flow_run_id))

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
        with self._places, get_client(sync_client=True) as client:
            flow_run_id = self._submit(client, job, report)
            try:
                return self._wait(client, flow_run_id, on_start)
            finally:
                with self._lock:
                    self._running.discard(flow_run_id)

    def _submit(self, client: SyncPrefectClient, job: Job, report: Report) -> UUID:
        is_for_gpu = job.stage in self._gpu_stages
        name = "deme-job/gpu" if is_for_gpu else "deme-job/cpu"
        device = "auto" if self._device == "cuda" and not is_for_gpu else self._device
        content = {"kind": type(job).__name__, "content": job.model_dump(mode="json"), "device": device}
        # For pools that start pods; workers of the others show all GPUs that they have.
        num_gpus = job.num_processes if is_for_gpu and device != "cpu" else 0
        deployment = self._patiently(client, lambda: client.read_deployment_by_name(name))
        key = uuid4().hex  # The client asks again where an answer was lost: that must not start a second one.
        flow_run = self._patiently(
            client,
            lambda: client.create_flow_run_from_deployment(
                deployment.id,
                parameters=content | {"sender": self._flow_run_id},
                job_variables={"gpu_limit": num_gpus},
                idempotency_key=key,
            ),
        )
        with self._lock:
            self._running.add(flow_run.id)
            is_late = self._closed
        if is_late:  # `close` did not see it.
            _cancel(client, flow_run.id)
            raise RunEndedError
        report({"message": f"flow run {flow_run.name} of {name}"})
        return flow_run.id

    def _wait(self, client: SyncPrefectClient, flow_run_id: UUID, on_start: Callable[[], None]) -> JobResult:
        started = False
        while True:
            state = self._patiently(client, lambda: client.read_flow_run(flow_run_id)).state
            if state is not None and state.is_running() and not started:
                started = True
                on_start()
            if state is not None and state.is_final():
                return self._outcome(str(flow_run_id), f"{state.name}: {state.message or 'no reason given'}")
            time.sleep(_POLL_SECONDS)

    def _patiently(self, client: SyncPrefectClient, ask: Callable[[], T]) -> T:
        """Returns what the server answers; while it is away it is asked again."""
        asked_first = time.monotonic()
        while True:
            try:
                return ask()
            except httpx.HTTPError as error:
                late = self._closed or time.monotonic() - asked_first > _PATIENCE_SECONDS
                if late or not _is_passing(error):
                    raise DemeError(f"Prefect's server {client.api_url} does not answer ({error}).") from error
            time.sleep(_POLL_SECONDS)

    def _outcome(self, flow_run_id: str, state: str) -> JobResult:
        try:
            outcome: dict[str, Any] = json.loads(self._store.get_bytes(outcome_key(flow_run_id)))
        except ArtifactNotFoundError as error:
            if self._closed:  # It did not die, it was cancelled: nobody shall try again.
                raise RunEndedError from error
            # Also where it failed: with the store away for a while it could not leave its outcome, and may try again.
            raise WorkerDiedError(
                f"Flow run {flow_run_id} of a job ended before the job was done ({state}); run again to go on from "
                "the last checkpoint."
            ) from error
        self._store.delete(outcome_key(flow_run_id))
        if "result" in outcome:
            return JobResult.from_dict(outcome["result"])
        raise job_error(outcome)

    def close(self) -> None:
        """Cancels what still runs."""
        with self._lock:
            self._closed = True
            running = set(self._running)
        self._signature.close()
        if running:
            # Of a server that is away nothing can be asked; the workers see for themselves that this run has ended.
            with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:
                for flow_run_id in running:
                    _cancel(client, flow_run_id)


def _is_passing(error: httpx.HTTPError) -> bool:
    """Whether the server is away or overloaded, and does not refuse."""
    return not isinstance(error, httpx.HTTPStatusError) or error.response.status_code in (429, 500, 502, 503, 504)


def _cancel(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    with contextlib.suppress(DemeError, ObjectNotFound):
        client.set_flow_run_state(flow_run_id, Cancelling())
