"""The Ray pool: each job is a Prefect task on a node of a Ray cluster, through prefect-ray.

The counterpart of `tasks.worker_pool` for recipes with ``execution.runner: ray``. Nodes share nothing with the flow but
the object store: a job travels as the argument of its task, its progress through an actor of the cluster. Ray and
prefect-ray, the extra ``ray``, are imported when the pool starts.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed

from deme_core.errors import RunEndedError, WorkerDiedError
from deme_core.recipe import ExecutionSpec
from deme_core.settings import Settings
from deme_core.store import ObjectStore, check_access
from tasks.error_messages import job_error
from tasks.health import check_api_address
from tasks.jobs import Job, JobResult
from tasks.progress import Report, waiting
from tasks.ray_cluster import check_listening, check_nodes, cluster_address, import_ray, joined_runner, on_head
from tasks.ray_node import JobFailedError, Mailbox, SentEnvironment, do_job

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 15.0


class RayPool:
    """Sends jobs to a Ray cluster; safe to use from many threads.

    Args:
        execution: says which cluster, and what a job reserves.
        settings: of the flow; what jobs need of the environment is sent with them.
        store: the object store, which every node must reach.
    """

    def __init__(self, execution: ExecutionSpec, settings: Settings, store: ObjectStore) -> None:
        self._execution, self._store = execution, store
        self._address = cluster_address(execution)
        self._environment = SentEnvironment.of(settings, is_here=self._address == "local")
        self._stack = contextlib.ExitStack()
        self._closed = False
        self._api_url = ""
        self._has_gpus = False

    def start(self) -> None:
        """Joins the cluster and checks that every node has this version of DeMe and sees the store.

        Raises:
            InputError: Ray is not installed, the cluster cannot be reached, or a node is not fit.
        """
        ray = import_ray(self._address)
        check_listening(self._address)
        with get_client(sync_client=True) as client:
            self._api_url = str(client.api_url)
        check_api_address(self._api_url)
        self._stack.callback(ray.shutdown)
        self._runner = self._stack.enter_context(joined_runner(self._address))
        check_access(self._store)
        check_nodes(self._store, self._environment, self._api_url)
        self._has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        # On the head, whose end is the cluster's end too.
        self._mailbox = ray.remote(Mailbox).options(num_cpus=0, max_restarts=-1, resources=on_head()).remote()

    def run(self, job: Job, report: Report, *, on_start: Callable[[], None] = lambda: None) -> JobResult:
        """Has ``job`` done by a node with room for it and returns its result.

        Args:
            job: what to do.
            report: called with every progress record, in the caller's thread.
            on_start: called when a node begins.

        Raises:
            DemeError: the job failed; of the class it failed with, where DeMe foresaw it.
            WorkerDiedError: its node, or its process there, ended before the job did.
        """
        import ray
        from prefect_ray.context import remote_options

        ticket = uuid4().hex
        options = self._reservation(job)
        if self._execution.device == "auto" and not self._has_gpus and self._address != "local":
            report({"message": "the cluster shows no GPU, so this takes CPUs; execution.device: cuda waits for one"})
        with temporary_settings({PREFECT_API_URL: self._api_url}), remote_options(**options):
            future = self._runner.submit(
                do_job,
                {
                    "job": job,
                    "environment": self._environment,
                    "num_threads": self._execution.cpus_per_job * job.num_processes,
                    "needs_gpu": options.get("num_gpus", 0) > 0,
                    "post": Post(self._mailbox, ticket),
                },
            )
        try:
            self._follow(future.wrapped_future, ticket, report, on_start)
            result: JobResult = future.result()
        except JobFailedError as error:
            raise job_error(error.args[0]) from None
        except ray.exceptions.RayError as error:
            if self._closed:  # It did not die, it was dismissed: nobody shall try again.
                raise RunEndedError from error
            self._say_it_crashed(future.task_run_id)
            raise WorkerDiedError(
                f"The node of {job.display_name} was lost ({type(error).__name__}) before its job was "
                "done; it goes on from the last checkpoint."
            ) from error
        return result

    def _reservation(self, job: Job) -> dict[str, Any]:
        execution = self._execution
        # Ray would do a lost task again by itself, under the same Prefect task run; the stage does that with a new one.
        options: dict[str, Any] = {
            "num_cpus": execution.cpus_per_job * job.num_processes,
            "max_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        wants_gpu = execution.device == "cuda" or (execution.device == "auto" and self._has_gpus)
        if wants_gpu and job.stage in execution.gpu_stages:
            options["num_gpus"] = job.num_processes
        return options

    def _follow(self, done: Any, ticket: str, report: Report, on_start: Callable[[], None]) -> None:
        """Passes on what a job posts until it is done."""
        import ray

        submitted, started = time.monotonic(), False
        while True:
            finished, _ = ray.wait([done], timeout=_POLL_SECONDS)
            for record in self._posted(ticket):
                if "started" in record:
                    started = True
                    on_start()
                    report({"message": f"on {record['started']}"})
                else:
                    report(record)
            if finished:
                return
            if self._closed:
                raise RunEndedError
            if not started and time.monotonic() - submitted > _PATIENCE_SECONDS:
                report(waiting("a node with room for it"))
                submitted = float("inf")

    def _posted(self, ticket: str) -> list[dict[str, Any]]:
        import ray

        try:
            records: list[dict[str, Any]] = ray.get(self._mailbox.take.remote(ticket), timeout=_POLL_SECONDS * 10)
        except ray.exceptions.RayError:  # It is starting again; what it held is in the job's result, too.
            return []
        return records

    def _say_it_crashed(self, task_run_id: Any) -> None:
        """Tells Prefect what the lost node cannot: its task run would be Running for ever."""
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:
            client.set_task_run_state(task_run_id, Crashed(message="The Ray node was lost."), force=True)

    def close(self) -> None:
        """Leaves the cluster, which ends this flow's jobs on all nodes."""
        self._closed = True
        self._stack.close()


class Post:
    """Sends progress records of one job to the mailbox, without waiting."""

    def __init__(self, mailbox: Any, ticket: str) -> None:
        self._mailbox, self._ticket = mailbox, ticket

    def __call__(self, record: dict[str, Any]) -> None:
        """Sends one record."""
        self._mailbox.post.remote(self._ticket, record)
