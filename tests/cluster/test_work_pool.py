"""`execution.runner: prefect` on workers with which the flow shares an object store alone: `make test-cluster`."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed, Running

from deme_core.errors import DemeError, InputError
from deme_core.file_store import FileStore
from deme_core.recipe import ExecutionSpec
from deme_core.settings import Settings
from deme_core.store import open_store
from flows.deploy import deploy
from flows.job import run_job
from flows.stack.processes import stop_tree
from tasks import remote_sender
from tasks.jobs import PretrainJob
from tasks.remote_pool import RemotePool
from tests.cluster.trainings import Trained, train, training_recipe
from tests.e2e.waiting import wait_for
from tests.integration.conftest import S3Server

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def deployments(prefect_server: None) -> None:
    deploy()


@contextmanager
def worker(home: Path, core: int, **environment: str) -> Iterator[psutil.Process]:
    """A machine that serves deme-gpu, with a disk of its own, and one core, as the local runner's workers have."""
    home.mkdir()
    command = [sys.executable, "-m", "flows.cli", "worker", "deme-gpu", "--limit", "1"]
    variables = {"PREFECT_API_URL": PREFECT_API_URL.value(), "PREFECT_WORKER_QUERY_SECONDS": "1"}
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | variables | {"DEME_HOME": str(home)} | environment,
            stdout=log,
            stderr=log,
            cwd=home,
        )
    os.sched_setaffinity(process.pid, {core})
    try:
        yield psutil.Process(process.pid)
    finally:
        stop_tree(psutil.Process(process.pid), seconds=15.0)
        process.wait()


def _kill_a_job(machine: psutil.Process) -> None:
    """Kills what the worker runs, once some training has left a checkpoint; the worker itself stays."""
    store = open_store(Settings().store_uri)
    wait_for(lambda: any("/step-" in each.key for each in store.list("checkpoints/")), 280)
    wait_for(lambda: machine.children())
    for process in machine.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.long
def test_two_workers_give_the_weights_of_the_local_runner_though_a_job_is_killed(
    deployments: None, flow_machine: S3Server, expected: Trained, tmp_path: Path
) -> None:
    first, *_, last = sorted(os.sched_getaffinity(0))
    with worker(tmp_path / "a", first), worker(tmp_path / "b", last) as machine:
        killer = threading.Thread(target=_kill_a_job, args=[machine])
        killer.start()
        _, results = train(training_recipe(runner="prefect"))
        killer.join()
    assert Trained.of(results) == expected
    assert "Crashed" in {each.state.name for each in _jobs() if each.state}
    assert not list(open_store(Settings().store_uri).list("jobs/"))


def test_a_job_ends_with_the_run_that_sent_it(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_sender, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(remote_sender, "_SIGN_SECONDS", 0.2)
    monkeypatch.setattr(remote_sender, "_LEASE", timedelta(seconds=3))
    store, stopped = FileStore(tmp_path), threading.Event()
    with get_client(sync_client=True) as client:
        sender = client.create_flow_run(train, parameters={"recipe": training_recipe()}, state=Running())
        sender_id = str(sender.id)
        with remote_sender.signed(store, sender_id):
            remote_sender.check_sender(store, sender_id)
            with remote_sender.while_sender_runs(store, sender_id, stopped.set):
                assert not stopped.wait(1)
                client.set_flow_run_state(sender.id, Crashed())
                assert not stopped.wait(4), "it lives, whatever the server thinks"
        remote_sender.sign(store, sender_id)  # As a process leaves it that is killed.
        with remote_sender.while_sender_runs(store, sender_id, stopped.set):
            assert stopped.wait(30)
    with pytest.raises(DemeError, match="has ended"):
        remote_sender.check_sender(store, sender_id)
    assert not list(store.list("jobs/"))


def _jobs() -> list[FlowRun]:
    jobs = FlowFilter(name=FlowFilterName(any_=["deme-job"]))
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_filter=jobs)


@pytest.fixture
def pool(deployments: None, flow_machine: S3Server) -> Iterator[RemotePool]:
    found = RemotePool(ExecutionSpec(runner="prefect"), open_store(Settings().store_uri), str(uuid4()))
    found.start()
    yield found
    found.close()


def _pretraining() -> PretrainJob:
    recipe = training_recipe(runner="prefect")
    assert recipe.pretrained.training is not None
    return PretrainJob(
        dataset=recipe.dataset,
        unet=recipe.pretrained.unet,
        noise_scheduler=recipe.pretrained.noise_scheduler,
        training=recipe.pretrained.training,
    )


def test_a_worker_does_a_job(pool: RemotePool, expected: Trained, tmp_path: Path) -> None:
    with worker(tmp_path / "home", min(os.sched_getaffinity(0))):
        assert pool.run(_pretraining(), lambda _: None).ref.digest == expected.digests["pretrained"]


def test_a_worker_with_another_store_refuses(pool: RemotePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting() -> list[FlowRun]:
        return [each for each in _jobs() if each.state and each.state.is_scheduled()]

    with ThreadPoolExecutor(1) as sender:
        sent = sender.submit(copy_context().run, pool.run, _pretraining(), lambda _: None)
        wait_for(waiting)
        monkeypatch.setenv("DEME_STORE_URI", (tmp_path / "elsewhere").as_uri())
        with pytest.raises(InputError, match="DEME_STORE_URI"):
            run_flow(run_job, waiting()[0])  # As the process does that a worker starts.
        with pytest.raises(DemeError, match="DEME_STORE_URI"):
            sent.result()
    assert not (tmp_path / "elsewhere" / "pretrained").exists()
