"""The Ray cluster of a run: its address, how it is joined, and whether its nodes are fit for DeMe's work.

Ray and prefect-ray, the extra ``ray``, are imported by `import_ray` first, and elsewhere once that is done.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from uuid import uuid4

from deme_core.code_version import code_version
from deme_core.errors import InputError
from deme_core.recipe import ExecutionSpec
from deme_core.store import ObjectStore
from tasks.ray_node import SentEnvironment, look_around
from tasks.remote_sender import JOBS_PREFIX

_LOOK_SECONDS = 90.0
_CONNECT_SECONDS = 10.0
# The head gives the process that it starts for a client half a minute to answer, and trips over one that ended.
_JOIN_ATTEMPTS, _BUSY = 3, ("Starting Ray client server failed", "psutil.ZombieProcess")


def cluster_address(execution: ExecutionSpec) -> str:
    """Returns what ``ray.init`` takes: the address of a cluster, or ``local`` for one that ends with the run.

    Raises:
        InputError: it holds more than a host and a port, which may be a password; it is not repeated.
    """
    address = execution.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    if any(sign in address for sign in "@?#"):
        raise InputError(
            "execution.ray_address and RAY_ADDRESS must be ray://HOST:PORT or HOST:PORT, without a password; use "
            "RAY_AUTH_TOKEN."
        )
    return address


def import_ray(address: str) -> Any:
    """Returns the module ``ray``; a cluster of this process's own will ask for a token that nobody else knows.

    Raises:
        InputError: Ray or prefect-ray is not installed.
    """
    if address == "local" and "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on all interfaces whatever it is told: nobody without this process's token shall be heard.
        # It reads this once, when it is imported.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid4().hex)
    try:
        ray = import_module("ray")
        import_module("prefect_ray")
    except ImportError as error:
        raise InputError(
            "execution.runner is ray, but Ray is not installed: install ray[default] and prefect-ray beside DeMe, "
            "as `make install` does."
        ) from error
    return ray


def check_listening(address: str) -> None:
    """Checks that somebody listens at the address: Ray would wait for minutes, and then end this process.

    Raises:
        InputError: nobody does, or it is none.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if address not in ("local", "auto"):
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _cannot_join(address, str(error)) from error


@contextlib.contextmanager
def joined_runner(address: str) -> Iterator[Any]:
    """Joins the cluster, or starts one that ends with this process, and gives prefect-ray's task runner of it.

    Raises:
        InputError: it cannot be joined.
    """
    from prefect_ray import RayTaskRunner

    with _joined(address, lambda: RayTaskRunner(address, init_kwargs=_init_options(address))) as runner:
        yield runner


@contextlib.contextmanager
def _joined(address: str, build_runner: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[Any]:
    """Gives the runner of a cluster that was joined; a head that is busy is asked again."""
    for attempts_left in reversed(range(_JOIN_ATTEMPTS)):
        with contextlib.ExitStack() as stack:
            try:
                runner = stack.enter_context(build_runner())
            except (ConnectionError, RuntimeError, ValueError) as error:
                if attempts_left and any(sign in str(error) for sign in _BUSY):
                    continue
                raise _cannot_join(address, str(error).strip().rpartition("\n")[2]) from error
            yield runner
            return


def _cannot_join(address: str, reason: str) -> InputError:
    mend = "correct execution.ray_address or RAY_ADDRESS"
    return InputError(f"The Ray cluster {address} cannot be joined ({reason}); {mend}.")


def _init_options(address: str) -> dict[str, Any]:
    if address.startswith("ray://"):
        return {"log_to_driver": False}
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    return quiet | {"include_dashboard": False} if address == "local" else quiet


def on_head() -> dict[str, float]:
    """Returns the resources by which Ray places something on the cluster's head; none where the head has no name.

    That is so in clusters of tests alone.
    """
    import ray

    name = "node:__internal_head__"
    return {name: 0.001} if name in ray.cluster_resources() else {}


def check_nodes(store: ObjectStore, environment: SentEnvironment, api_url: str) -> None:
    """Checks that every node of the cluster has this version of DeMe, and sees the store and Prefect's server.

    Args:
        store: the flow's.
        environment: what jobs get of the flow's.
        api_url: of Prefect's server.

    Raises:
        InputError: a node is not fit; says which, and why.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    key = f"{JOBS_PREFIX}ray-{uuid4().hex}"
    store.put_bytes(key, b"seen")
    look = ray.remote(look_around)
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        answers = [
            look.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(environment, key, api_url)
            for node in alive
        ]
        for node, answer in zip(alive, answers, strict=True):
            _check_node(f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", answer, store)
    finally:
        store.delete(key)


def _check_node(name: str, answer: Any, store: ObjectStore) -> None:
    import ray

    try:
        found = ray.get(answer, timeout=_LOOK_SECONDS)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        reason = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
        raise InputError(
            f"Node {name} of the Ray cluster cannot do DeMe's work: {reason} It needs DeMe installed, and "
            f"the object store {store.uri}."
        ) from error
    if found != (expected := code_version()):
        raise InputError(
            f"Node {name} of the Ray cluster has DeMe {found}, this machine {expected}; install the same on "
            "both (deme --version)."
        )
