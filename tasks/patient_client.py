"""A patient client: MLflow's, which waits while its server is down, so that no run fails for a server that restarts."""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from deme_core.errors import TrackingUnavailableError
from deme_core.settings import Settings
from tasks.mlflow_client import mlflow_client

T = TypeVar("T")

_PATIENCE_SEC = 300.0
_POLL_SEC = 3.0


# Calls at once. A local database takes one writer at a time, and a server's not many more: left to themselves 32 tasks
# wait in MLflow's pool of 15 connections until that gives up after half a minute (benchmarks/overhead.py).
_LOCAL_TURNS, _SERVER_TURNS = threading.Semaphore(1), threading.Semaphore(8)


def patient_client(settings: Settings) -> Any:
    """Returns an MlflowClient for what a run writes, whose calls take turns; a patient one, if there is a server."""
    client = mlflow_client(settings)
    if not settings.has_tracking_server:
        return OrderlyClient(client, _LOCAL_TURNS)
    return PatientClient(OrderlyClient(client, _SERVER_TURNS), settings.tracking_place)


class OrderlyClient:
    """Has the methods of an MlflowClient; only so many of this process's threads are in a call at once.

    Args:
        client: the MlflowClient.
        turns: what all clients of the same tracking share.
    """

    def __init__(self, client: Any, turns: threading.Semaphore) -> None:
        self._client, self._turns = client, turns

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._turns:
                return method(*args, **kwargs)

        return call


class PatientClient:
    """Has the methods of an MlflowClient; a call that finds no server is repeated for five minutes.

    What is repeated after a lost answer is written once all the same: MLflow's databases know a metric by run, name,
    step, time and value, and parameters, tags and files replace themselves.

    Args:
        client: the MlflowClient.
        place: what messages call the server.
    """

    def __init__(self, client: Any, place: str) -> None:
        self._client, self._place = client, place

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: self._call(lambda: method(*args, **kwargs))

    def _call(self, act: Callable[[], T]) -> T:
        deadline = time.monotonic() + _PATIENCE_SEC
        while True:
            try:
                return act()
            except Exception as error:
                if not _is_away(error):
                    raise
                if time.monotonic() >= deadline:
                    raise TrackingUnavailableError(
                        f"MLflow at {self._place} did not answer for {_PATIENCE_SEC:.0f} s ({type(error).__name__}); "
                        "start it and run again, which computes nothing that the object store has."
                    ) from error
            time.sleep(_POLL_SEC)


def _is_away(error: Exception) -> bool:
    """Whether there was no server, or it could not answer for the time being."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() >= 500
    if isinstance(error, RequestException):
        return error.response is None or error.response.status_code >= 500
    return False
