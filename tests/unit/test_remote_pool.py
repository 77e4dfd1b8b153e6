import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deme_core.errors import DemeError, InputError
from deme_core.file_store import FileStore
from deme_core.recipe import ExecutionSpec
from tasks import remote_pool
from tasks.jobs import ImportJob
from tasks.remote_pool import RemotePool


def test_an_address_with_a_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    pool = RemotePool(ExecutionSpec(runner="prefect"), FileStore(tmp_path), "flow-run")
    address = temporary_settings({PREFECT_API_URL: "http://user:hush@127.0.0.1:1/api"})
    with address, pytest.raises(InputError, match="PREFECT_API_AUTH_STRING") as caught:
        pool.start()
    assert "hush" not in "".join(traceback.format_exception(caught.value))


def _refusal(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://127.0.0.1/api")
    return httpx.HTTPStatusError(str(status), request=request, response=httpx.Response(status, request=request))


class Answers:
    """What a server says, one thing after another."""

    api_url = "http://127.0.0.1/api"

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    def __call__(self) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_server_that_is_away_is_asked_again_and_one_that_refuses_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_pool, "_POLL_SECONDS", 0.0)
    pool = RemotePool(ExecutionSpec(runner="prefect"), FileStore(tmp_path), "flow-run")
    server: Any = Answers(httpx.ConnectError("away"), _refusal(503), "here")
    assert pool._patiently(server, server) == "here"
    server = Answers(_refusal(422), "here")
    with pytest.raises(DemeError, match="422"):
        pool._patiently(server, server)
    monkeypatch.setattr(remote_pool, "_PATIENCE_SECONDS", -1.0)
    server = Answers(httpx.ConnectError("away"), "here")
    with pytest.raises(DemeError, match="does not answer"):
        pool._patiently(server, server)


def test_a_job_whose_answer_was_lost_is_not_sent_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_pool, "_POLL_SECONDS", 0.0)
    keys: list[str] = []

    def create(*_: Any, idempotency_key: str, job_variables: dict[str, int], parameters: dict[str, Any]) -> Any:
        assert (job_variables["gpu_limit"], parameters["device"]) == (1, "cuda")
        keys.append(idempotency_key)
        if len(keys) == 1:
            raise httpx.ReadTimeout("lost")
        return SimpleNamespace(id=uuid4(), name="dashing-otter")

    server: Any = SimpleNamespace(
        api_url=Answers.api_url,
        read_deployment_by_name=lambda _: SimpleNamespace(id=uuid4()),
        create_flow_run_from_deployment=create,
    )
    pool = RemotePool(ExecutionSpec(runner="prefect", device="cuda"), FileStore(tmp_path), "flow-run")
    pool._submit(server, ImportJob(source="model"), lambda _: None)
    pool._submit(server, ImportJob(source="other"), lambda _: None)
    first, again, other = keys
    assert first == again != other
