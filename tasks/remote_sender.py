"""What the worker of a remote job asks of the flow run that sent it: is its store mine, and is it still there?

With another store, by the same URI perhaps, a worker would train for hours and leave the outcome where nobody looks. So
a flow signs in its store, under its own id, with its version. And a flow whose process is killed cancels nothing: its
jobs see in Prefect, some minutes later, that it has ended, and end, too.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from deme_core.errors import ArtifactNotFoundError, DemeError, InputError
from deme_core.store import ObjectStore

_LOOK_SECONDS = 20.0


def outcome_key(flow_run_id: str) -> str:
    """Returns the object that holds the outcome of a job's flow run."""
    return f"jobs/{flow_run_id}.json"


def is_outcome(key: str) -> bool:
    """Tells outcomes from the other objects of a store."""
    return key.startswith("jobs/") and key.endswith(".json")


def _signature_key(flow_run_id: str) -> str:
    return f"jobs/sender-{flow_run_id}"


def sign(store: ObjectStore, flow_run_id: str) -> None:
    """Leaves this flow run's version in its store."""
    store.put_bytes(_signature_key(flow_run_id), version("deme").encode())


def unsign(store: ObjectStore, flow_run_id: str) -> None:
    """Takes it away: this flow run wants no more outcomes."""
    store.delete(_signature_key(flow_run_id))


def check_sender(store: ObjectStore, flow_run_id: str) -> None:
    """Checks on a worker that the flow run wants an outcome, in this store, and is of this version.

    Raises:
        InputError: it is of another version, or its signature is not in this store.
        DemeError: it has ended.
    """
    if _has_ended(flow_run_id):
        unsign(store, flow_run_id)  # If it was killed it has not done that itself.
        raise DemeError("The run which sent this job has ended.")
    try:
        expected = store.get_bytes(_signature_key(flow_run_id)).decode()
    except ArtifactNotFoundError as error:
        raise InputError(
            f"The object store of this worker, {store.place}, is not that of the run which sent the job; give both the "
            "same DEME_STORE_URI and AWS_ENDPOINT_URL."
        ) from error
    if expected != version("deme"):
        raise InputError(f"This worker has DeMe {version('deme')}, the run which sent the job {expected}.")


@contextlib.contextmanager
def while_sender_runs(flow_run_id: str, stop: Callable[[], None]) -> Iterator[None]:
    """Calls ``stop``, in another thread, if the flow run ends meanwhile."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_SECONDS):
            if _has_ended(flow_run_id):
                stop()
                return

    threading.Thread(target=look, name="looking after the sender", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _has_ended(flow_run_id: str) -> bool:
    """Returns whether Prefect says so; a server that is away, or knows no such run, says nothing."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run_id)).state
    except (httpx.HTTPError, ObjectNotFound):
        return False
    return state is not None and state.is_final()
