"""What runs on the nodes of a Ray cluster: the Prefect task that does a job there, and what its progress travels by.

Imported on every node, so torch is not imported here, and Ray only once it runs.
"""

import contextvars
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import task_run

from deme_core.code_version import code_version
from deme_core.errors import DemeError, InputError
from deme_core.settings import Settings
from deme_core.store import check_access, open_store
from tasks.error_messages import error_message
from tasks.jobs import Job, JobResult
from tasks.progress import Report
from tasks.slots import Slot, visible_gpus
from tasks.worker_pool import WorkerPool

_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
# Of the flow's environment, what jobs need. AWS_PROFILE and files of keys name things of the flow's machine.
_SENT = (
    *_KEYS,
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_CA_BUNDLE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
)
_ANSWER_SECONDS = 20.0


class SentEnvironment:
    """The flow's settings on their way to a node: as an argument, since Ray logs the environments of its workers."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = dict(variables)

    @classmethod
    def of(cls, settings: Settings, *, is_here: bool = False) -> "SentEnvironment":
        """Takes what jobs need from this process; with its folder of local state, if the node is this machine."""
        sent = {name: os.environ[name] for name in _SENT if name in os.environ}
        home = {"DEME_HOME": str(settings.state_folder)} if is_here else {}
        return cls(sent | home | {"DEME_STORE_URI": settings.store_uri})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(sorted(self._variables))})"

    def apply(self) -> None:
        """Sets what this node does not set itself; of a node with keys of its own, no key is mixed with others."""
        own_keys = "AWS_ACCESS_KEY_ID" in os.environ
        for name, value in self._variables.items():
            if not (own_keys and name in _KEYS):
                os.environ.setdefault(name, value)
        os.environ["DEME_STORE_URI"] = self._variables["DEME_STORE_URI"]
        os.environ.setdefault("DEME_HOME", str(Path.home() / ".deme"))


class JobFailedError(Exception):
    """A job failed; its argument is what `tasks.error_messages` makes of the error."""


class Mailbox:
    """Keeps the progress of jobs until the flow takes it: a Ray actor, since either side may be behind a proxy."""

    def __init__(self) -> None:
        self._records: dict[str, list[dict[str, Any]]] = {}

    def post(self, ticket: str, record: dict[str, Any]) -> None:
        """Takes a record of a job."""
        self._records.setdefault(ticket, []).append(record)

    def take(self, ticket: str) -> list[dict[str, Any]]:
        """Gives the records of a job that were not given yet."""
        return self._records.pop(ticket, [])


def look_around(environment: SentEnvironment, key: str, api_url: str) -> str:
    """Returns the version of DeMe of this node, once it has read the object ``key`` and heard from Prefect.

    Raises:
        StoreUnavailableError: the node cannot use the object store.
        ArtifactNotFoundError: it has another store by the same URI, such as a folder of its own.
        InputError: it cannot reach the Prefect server.
    """
    environment.apply()
    try:
        httpx.get(f"{api_url.rstrip('/')}/health", timeout=_ANSWER_SECONDS)
    except httpx.HTTPError as error:
        raise InputError(
            f"No answer from {api_url} ({type(error).__name__}); set PREFECT_API_URL to a server that nodes can reach."
        ) from None
    store = open_store(Settings().store_uri)
    check_access(store)
    store.get_bytes(key)
    return code_version()


def _task_name() -> str:
    return f"{task_run.parameters['job'].stage} on {_node_name()}"


def _node_name() -> str:
    import ray

    return f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:8]})"


@task(name="job", task_run_name=_task_name, cache_policy=NO_CACHE)
def do_job(job: Job, environment: SentEnvironment, *, num_threads: int, needs_gpu: bool, post: Report) -> JobResult:
    """Does a job in a worker process of this node.

    Args:
        job: what to do.
        environment: of the flow.
        num_threads: threads torch may use, so that numbers do not depend on the node.
        needs_gpu: whether Ray reserved a GPU.
        post: takes progress records.

    Raises:
        JobFailedError: the job failed.
    """
    environment.apply()
    _log_in_context(get_run_logger())
    post({"started": _node_name()})
    try:
        return _pool(num_threads, needs_gpu).run(job, post)
    except DemeError as error:
        raise JobFailedError(error_message(error)) from None
    finally:
        if needs_gpu and (used := _pools.pop((num_threads, needs_gpu), None)):  # Ray gives the GPU to another job now.
            used.close()


# Of this Ray worker, which serves one flow run and one job at a time: a process that has imported torch is kept.
_pools: dict[tuple[int, bool], WorkerPool] = {}
_write_log: list[Callable[[str], None]] = []


def _log_in_context(logger: Any) -> None:
    """Sends what worker processes print to the present task run; another thread reads it, which knows no settings."""
    context = contextvars.copy_context()
    _write_log[:] = [lambda line: context.run(logger.info, "worker: %s", line)]


def _pool(num_threads: int, needs_gpu: bool) -> WorkerPool:
    if (num_threads, needs_gpu) not in _pools:
        gpus = visible_gpus() if needs_gpu else []
        if needs_gpu and not gpus:
            raise InputError("Ray reserved a GPU on a node that shows none; check the node's drivers.")
        slot = Slot("cuda", ",".join(gpus), num_threads) if gpus else Slot("cpu", None, num_threads)
        _pools[num_threads, needs_gpu] = WorkerPool([slot], log=lambda line: _write_log[0](line))
    return _pools[num_threads, needs_gpu]
