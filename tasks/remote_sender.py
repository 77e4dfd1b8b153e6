"""What the worker of a remote job asks of the flow run that sent it: is its store mine, and is it still there?

With another store, by the same URI perhaps, a worker would train for hours and leave the outcome where nobody looks. So
a flow signs in its store, under its own id, with the version of its code. And a flow whose process is killed cancels
nothing: its jobs see in Prefect, some minutes later, that it has ended, and end, too. A server with too much to do may
say that of a flow that lives; so it signs again and again, and has ended only when it does not.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from deme_core.code_version import code_version
from deme_core.errors import ArtifactNotFoundError, DemeError, InputError, StoreUnavailableError
from deme_core.store import ObjectStore, store_time

_LOOK_SECONDS = 20.0
_SIGN_SECONDS = 20.0
_LEASE = timedelta(seconds=5 * _SIGN_SECONDS)


# All that is below it is collected, or renewed, within minutes: what is older is of a run that was killed.
JOBS_PREFIX = "jobs/"


def outcome_key(flow_run_id: str) -> str:
    """Returns the object that holds the outcome of a job's flow run."""
    return f"{JOBS_PREFIX}{flow_run_id}.json"


def _signature_key(flow_run_id: str) -> str:
    return f"{JOBS_PREFIX}sender-{flow_run_id}"


def sign(store: ObjectStore, flow_run_id: str) -> None:
    """Leaves the version of this flow run's code in its store."""
    store.put_bytes(_signature_key(flow_run_id), code_version().encode())


@contextlib.contextmanager
def signed(store: ObjectStore, flow_run_id: str) -> Iterator[None]:
    """Keeps this flow run's signature fresh, and takes it away in the end: it wants no more outcomes then."""
    sign(store, flow_run_id)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(_SIGN_SECONDS):
            with contextlib.suppress(DemeError):  # A store that is away for minutes ends jobs by itself.
                sign(store, flow_run_id)

    thread = threading.Thread(target=renew, name="signing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()  # Else it might sign once more.
        with contextlib.suppress(DemeError):
            unsign(store, flow_run_id)


def unsign(store: ObjectStore, flow_run_id: str) -> None:
    """Takes the signature away."""
    store.delete(_signature_key(flow_run_id))


def check_sender(store: ObjectStore, flow_run_id: str) -> None:
    """Checks on a worker that the flow run wants an outcome, in this store, and has this code.

    Raises:
        InputError: it has another, or its signature is not in this store.
        DemeError: it has ended.
    """
    if _has_ended(store, flow_run_id):
        unsign(store, flow_run_id)  # If it was killed it has not done that itself.
        raise DemeError("The run which sent this job has ended.")
    try:
        expected = store.get_bytes(_signature_key(flow_run_id)).decode()
    except ArtifactNotFoundError as error:
        raise InputError(
            f"The object store of this worker, {store.place}, is not that of the run which sent the job; give both the "
            "same DEME_STORE_URI and AWS_ENDPOINT_URL."
        ) from error
    if expected != code_version():
        raise InputError(
            f"This worker has DeMe {code_version()}, the run which sent the job {expected}; install the "
            "same on both (deme --version)."
        )


@contextlib.contextmanager
def while_sender_runs(store: ObjectStore, flow_run_id: str, stop: Callable[[], None]) -> Iterator[None]:
    """Calls ``stop``, in another thread, if the flow run ends meanwhile."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_SECONDS):
            if _has_ended(store, flow_run_id):
                stop()
                return

    threading.Thread(target=look, name="looking after the sender", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _has_ended(store: ObjectStore, flow_run_id: str) -> bool:
    """Returns whether Prefect says so, and no signature says otherwise; whoever is away says nothing."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run_id)).state
        return state is not None and state.is_final() and not _signed_lately(store, flow_run_id)
    except (httpx.HTTPError, ObjectNotFound, StoreUnavailableError):
        return False


def _signed_lately(store: ObjectStore, flow_run_id: str) -> bool:
    key = _signature_key(flow_run_id)
    found = [each for each in store.list(key) if each.key == key]
    return bool(found) and store_time(store) - found[0].modified < _LEASE
