import json
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Running, State

from deme_core.errors import DemeError, InputError, StoreUnavailableError
from deme_core.file_store import FileStore
from deme_core.manifest import ArtifactRef
from deme_core.recipe import ExecutionSpec
from deme_core.recipe_file import load_recipe
from tasks import remote_pool, remote_sender
from tasks.jobs import ImportJob, JobResult, pretrained_job
from tasks.remote_pool import RemotePool
from tests.e2e.waiting import wait_for


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


@pytest.mark.parametrize(
    ("stages", "expected"), [([], ("deme-job/cpu", 0, "auto")), (["pretrained"], ("deme-job/gpu", 2, "cuda"))]
)
def test_a_job_asks_for_the_gpus_of_its_training_where_its_stage_is_one_for_them(
    tmp_path: Path, stages: list[str], expected: tuple[str, int, str]
) -> None:
    sent: list[Any] = []

    def create(name: str, *, parameters: dict[str, Any], job_variables: dict[str, int], **_: Any) -> Any:
        sent.append((name, job_variables["gpu_limit"], parameters["device"]))
        return SimpleNamespace(id=uuid4(), name="dashing-otter")

    server: Any = SimpleNamespace(
        read_deployment_by_name=lambda name: SimpleNamespace(id=name), create_flow_run_from_deployment=create
    )
    execution = ExecutionSpec.model_validate({"runner": "prefect", "device": "cuda", "gpu_stages": stages})
    job: Any = pretrained_job(load_recipe("digits", ["pretrained.training.num_processes=2"]))
    RemotePool(execution, FileStore(tmp_path), "flow-run")._submit(server, job, lambda _: None)
    assert sent == [expected]


class Server:
    """Starts every flow run at once, and ends it when it is told to, or to cancel it."""

    api_url = Answers.api_url

    def __init__(self, store: FileStore) -> None:
        self._store, self.states = store, dict[UUID, State[Any]]()

    @contextmanager
    def client(self, **_: Any) -> Iterator["Server"]:
        yield self

    def read_deployment_by_name(self, _: str) -> Any:
        return SimpleNamespace(id=uuid4())

    def create_flow_run_from_deployment(self, *_: Any, **__: Any) -> Any:
        flow_run = SimpleNamespace(id=uuid4(), name="dashing-otter")
        self.states[flow_run.id] = Running()
        return flow_run

    def read_flow_run(self, flow_run_id: UUID) -> Any:
        return SimpleNamespace(state=self.states[flow_run_id])

    def set_flow_run_state(self, flow_run_id: UUID, state: State[Any]) -> None:
        assert state.is_cancelling()
        self.states[flow_run_id] = Cancelled()

    def under_way(self) -> list[UUID]:
        return [flow_run_id for flow_run_id, state in self.states.items() if state.is_running()]

    def finish(self, flow_run_id: UUID) -> JobResult:
        name = str(flow_run_id)
        result = JobResult(ArtifactRef(f"{self._store.uri}/pretrained/{name}", name), {}, False, 0.0, 0.0)
        outcome = json.dumps({"result": result.to_dict()})
        self._store.put_bytes(remote_sender.outcome_key(name), outcome.encode())
        self.states[flow_run_id] = Completed()
        return result


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    found = Server(FileStore(tmp_path))
    monkeypatch.setattr(remote_pool, "get_client", found.client)
    monkeypatch.setattr(remote_pool, "_POLL_SECONDS", 0.01)
    return found


def test_no_more_jobs_are_sent_than_the_recipe_allows_at_once(tmp_path: Path, server: Server) -> None:
    pool = RemotePool(ExecutionSpec(runner="prefect", num_workers=1), FileStore(tmp_path), "flow-run")
    with ThreadPoolExecutor(2) as threads:
        sent = [threads.submit(pool.run, ImportJob(source=name), lambda _: None) for name in ("a", "b")]
        done, at_once = list[JobResult](), list[int]()
        for _ in sent:
            wait_for(server.under_way, 30)
            time.sleep(0.1)  # The other job has had the time to be sent.
            first, *_ = under_way = server.under_way()
            at_once.append(len(under_way))
            done.append(server.finish(first))
        assert sorted(future.result(30).ref.digest for future in sent) == sorted(each.ref.digest for each in done)
    assert at_once == [1, 1]
    assert not list(FileStore(tmp_path).list("jobs/")), "outcomes are collected"


def test_a_pool_that_closes_cancels_what_it_sent_and_what_it_was_about_to_send(tmp_path: Path, server: Server) -> None:
    pool = RemotePool(ExecutionSpec(runner="prefect"), FileStore(tmp_path), "flow-run")
    with ThreadPoolExecutor(1) as threads:
        sent = threads.submit(pool.run, ImportJob(source="model"), lambda _: None)
        wait_for(server.under_way, 30)
        (flow_run_id,) = server.states
        pool.close()
        try:
            assert not server.under_way()
        finally:
            server.states[flow_run_id] = Cancelled()
        with pytest.raises(DemeError, match="ended before the job did"):
            sent.result(30)
    with pytest.raises(DemeError, match="ended before the job did"):
        pool._submit(server, ImportJob(source="late"), lambda _: None)  # type: ignore[arg-type]
    assert len(server.states) == 2
    assert not server.under_way()


def test_a_worker_of_other_sources_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_away(**_: Any) -> None:
        raise httpx.ConnectError("away")

    monkeypatch.setattr(remote_sender, "get_client", be_away)
    store = FileStore(tmp_path)
    remote_sender.sign(store, "flow-run")
    remote_sender.check_sender(store, "flow-run")
    monkeypatch.setattr(remote_sender, "code_version", lambda: "0.1.0+other")
    with pytest.raises(InputError, match=r"This worker has DeMe 0\.1\.0\+other, the run which sent the job "):
        remote_sender.check_sender(store, "flow-run")


def test_a_flow_signs_again_though_the_store_was_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_sender, "_SIGN_SECONDS", 0.01)
    store, signed, signed_again = FileStore(tmp_path), list[str](), threading.Event()
    put_bytes = store.put_bytes

    def be_away_once(key: str, data: bytes) -> bool:
        signed.append(key)
        if len(signed) == 2:
            raise StoreUnavailableError("away")
        if len(signed) > 2:
            signed_again.set()
        return put_bytes(key, data)

    monkeypatch.setattr(store, "put_bytes", be_away_once)
    with remote_sender.signed(store, "flow-run"):
        assert signed_again.wait(10)


def test_a_flow_that_prefect_calls_crashed_goes_on_while_it_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = SimpleNamespace(read_flow_run=lambda _: SimpleNamespace(state=Crashed()))
    monkeypatch.setattr(remote_sender, "get_client", lambda **_: nullcontext(server))
    store, flow_run_id = FileStore(tmp_path), str(uuid4())
    remote_sender.sign(store, flow_run_id)
    remote_sender.check_sender(store, flow_run_id)
    remote_sender.unsign(store, flow_run_id)
    with pytest.raises(DemeError, match="The run which sent this job has ended"):
        remote_sender.check_sender(store, flow_run_id)
