import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deme_core.errors import InputError
from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, ExecutionSpec, MethodSpec, TrainingSpec
from deme_core.settings import Settings
from deme_core.store import open_store
from tasks.jobs import MergeJob, PretrainJob
from tasks.ray_cluster import _joined, cluster_address
from tasks.ray_node import Mailbox, SentEnvironment
from tasks.ray_pool import RayPool


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> SentEnvironment:
    """What a flow sends, in the environment of a node that has nothing yet."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in list(os.environ):
        if name.startswith(("AWS_", "DEME_", "HF_")):
            del os.environ[name]
    flow = {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "pa55",
        "AWS_SESSION_TOKEN": "t0ken",
        "AWS_PROFILE": "me",
    }
    os.environ.update(flow)
    found = SentEnvironment.of(Settings.model_validate({"DEME_STORE_URI": "s3://bucket/store"}))
    for name in flow:
        del os.environ[name]
    return found


def test_a_node_gets_the_flows_store_and_keys_but_nothing_that_names_its_files(sent: SentEnvironment) -> None:
    pickle.loads(pickle.dumps(sent)).apply()
    assert os.environ["DEME_STORE_URI"] == "s3://bucket/store"
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "pa55"
    assert "AWS_PROFILE" not in os.environ


def test_ray_that_ends_with_the_run_keeps_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"DEME_HOME": str(tmp_path)})
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "DEME_HOME"})
    pickle.loads(pickle.dumps(SentEnvironment.of(settings, is_here=True))).apply()
    assert os.environ["DEME_HOME"] == str(tmp_path)


def test_keys_of_a_node_are_not_mixed_with_those_of_the_flow(sent: SentEnvironment) -> None:
    os.environ |= {"AWS_ACCESS_KEY_ID": "own", "AWS_SECRET_ACCESS_KEY": "own", "DEME_HOME": "/disk"}
    sent.apply()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "own"
    assert "AWS_SESSION_TOKEN" not in os.environ
    assert os.environ["DEME_HOME"] == "/disk"


def test_no_message_shows_a_key(sent: SentEnvironment) -> None:
    assert "AWS_SECRET_ACCESS_KEY" in repr(sent)
    assert not [value for value in ("pa55", "t0ken") if value in f"{sent!r} {sent}"]


def test_a_mailbox_gives_each_record_once_to_whom_it_is_for() -> None:
    mailbox = Mailbox()
    for step in (1, 2):
        mailbox.post("a", {"step": step})
    mailbox.post("b", {"step": 9})
    assert mailbox.take("a") == [{"step": 1}, {"step": 2}]
    assert (mailbox.take("a"), mailbox.take("b")) == ([], [{"step": 9}])


def test_the_recipe_names_the_cluster_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(ExecutionSpec(runner="ray")) == "local"
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert cluster_address(ExecutionSpec(runner="ray")) == "ray://head:10001"
    assert cluster_address(ExecutionSpec(runner="ray", ray_address="other:6379")) == "other:6379"


@pytest.mark.parametrize("address", ["ray://127.0.0.1:9", "127.0.0.1:9", "nonsense"])
def test_an_address_where_nobody_listens_is_said_at_once(address: str, tmp_path: Path) -> None:
    settings = Settings.model_validate({"DEME_HOME": tmp_path, "DEME_STORE_URI": None})
    pool = RayPool(ExecutionSpec(runner="ray", ray_address=address), settings, open_store(settings.store_uri))
    with pytest.raises(InputError, match=rf"{address} cannot be joined .*; correct execution.ray_address"):
        pool.start()
    pool.close()


@pytest.mark.parametrize("address", ["u:hush@127.0.0.1:1", "127.0.0.1:1?token=hush", "ray://127.0.0.1:1/#hush"])
def test_an_address_with_a_password_is_refused_and_not_repeated(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for execution in (ExecutionSpec(runner="ray", ray_address=address), ExecutionSpec(runner="ray")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(InputError, match="must be ray://HOST:PORT") as caught:
            RayPool(execution, Settings(), open_store(tmp_path.as_uri()))
        assert "hush" not in str(caught.value)


BUSY = "Initialization failure from server:\nTraceback …\nRuntimeError: Starting Ray client server failed."
ENDED = "Initialization failure from server:\nTraceback …\npsutil.ZombieProcess: PID still exists"


@pytest.mark.parametrize(
    ("failures", "joins", "num_attempts"),
    [([BUSY, ENDED], True, 3), ([BUSY] * 3, False, 3), (["the versions differ"], False, 1)],
    ids=["busy for a while", "busy for good", "something else"],
)
def test_a_busy_head_is_asked_again(failures: list[str], joins: bool, num_attempts: int) -> None:
    attempts: list[int] = []

    @contextlib.contextmanager
    def build() -> Iterator[str]:
        attempts.append(1)
        if len(attempts) <= len(failures):
            raise ConnectionAbortedError(failures[len(attempts) - 1])
        yield "runner"

    refused = pytest.raises(InputError, match=f"cannot be joined .{re.escape(failures[-1].splitlines()[-1])}")
    with contextlib.nullcontext() if joins else refused, _joined("local", build) as runner:
        assert runner == "runner"
    assert len(attempts) == num_attempts


@pytest.mark.parametrize(
    ("device", "has_gpus", "processes", "gpus"),
    [
        ("auto", True, 1, 1),
        ("auto", True, 2, 2),
        ("auto", False, 2, None),
        ("cuda", False, 1, 1),
        ("cpu", True, 1, None),
    ],
)
def test_a_training_reserves_a_gpu_for_each_of_its_processes(
    device: str, has_gpus: bool, processes: int, gpus: int | None, tmp_path: Path
) -> None:
    execution = ExecutionSpec.model_validate({"runner": "ray", "device": device, "cpus_per_job": 3})
    pool = RayPool(execution, Settings(), open_store(tmp_path.as_uri()))
    pool._has_gpus = has_gpus
    training = TrainingSpec(num_steps=1, num_processes=processes)
    dataset = DatasetSpec(source="digits")
    reserved = pool._reservation(PretrainJob(dataset=dataset, unet={}, noise_scheduler={}, training=training))
    assert (reserved["num_cpus"], reserved.get("num_gpus")) == (3 * processes, gpus)
    model = ArtifactRef("file:///store/pretrained/a", "a")
    merge = MergeJob(pretrained=model, experts=(model,), method=MethodSpec(), weights=(1.0,))
    assert "num_gpus" not in pool._reservation(merge), "what is no stage of execution.gpu_stages takes none"
