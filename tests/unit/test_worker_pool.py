"""The worker pool: which processes it starts, and when, and who gets which GPU."""

import importlib.util
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deme_core.errors import DemeError, GpuMemoryError, InputError, WorkerDiedError
from deme_core.recipe import ExecutionSpec
from tasks import gpu_lock, progress, slots, worker_pool
from tasks.gpu_lock import GpuLock
from tasks.jobs import ImportJob
from tasks.slots import Slot, plan_slots
from tasks.worker_pool import WorkerPool
from tasks.worker_process import WorkerProcess


@dataclass(frozen=True)
class FakeJob:
    name: str
    num_processes: int = 1
    can_wait: bool = False
    display_name: str = "fake"


class Bench:
    """A pool whose workers only note who began what, and end their jobs when they are told."""

    def __init__(self, gpus: str, num_processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began: list[tuple[str, str]] = []
        self.dismissed: list[str] = []
        self.ends: dict[str, threading.Event] = {}
        self.said: list[str] = []
        self.records: list[dict[str, Any]] = []
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        self.pool = WorkerPool(plan_slots(ExecutionSpec(), num_processes), self.said.append)
        for worker in self.pool._workers:
            monkeypatch.setattr(worker, "run", partial(self._run, worker))
            monkeypatch.setattr(worker, "close", lambda _, gpus=worker._slot.gpu: self.dismissed.append(gpus))
        self._threads = ThreadPoolExecutor(16)

    def _run(self, worker: WorkerProcess, job: FakeJob, _: Any) -> None:
        self.began.append((job.name, str(worker._slot.gpu)))
        assert self.ends[job.name].wait(30)

    def send(self, name: str, **settings: Any) -> Future[Any]:
        """Sends a job, and waits until it has begun or waits for others."""
        job: Any = FakeJob(name, **settings)
        self.ends[name] = threading.Event()
        before = len(self.began) + len(self.pool._waiting)
        sent = self._threads.submit(self.pool.run, job, self.records.append)
        until(lambda: len(self.began) + len(self.pool._waiting) > before)
        return sent

    def end(self, name: str) -> None:
        self.ends[name].set()

    def close(self) -> None:
        for end in self.ends.values():
            end.set()
        self.pool.close()
        self._threads.shutdown()


BenchMaker = Callable[..., Bench]


@pytest.fixture(autouse=True)
def names_of_gpus_are_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no nvidia-smi, also on a machine with GPUs; test_slots.py has the others."""
    monkeypatch.setattr(slots, "_listed_gpus", lambda: ())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(gpu_lock, "FOLDER", tmp_path)
    benches: list[Bench] = []

    def make(gpus: str, num_processes: int = 1) -> Bench:
        benches.append(Bench(gpus, num_processes, monkeypatch))
        return benches[-1]

    yield make
    for made in benches:
        made.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_first_job_finds_its_process_started_and_the_others_start_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[WorkerProcess] = []
    used: list[WorkerProcess] = []
    monkeypatch.setattr(WorkerProcess, "start", lambda worker: started.append(worker))
    monkeypatch.setattr(WorkerProcess, "run", lambda worker, *_: used.append(worker))
    pool = WorkerPool([Slot("cpu", None, 1)] * 3)
    job: Any = FakeJob("a job")

    pool.start()
    (first,) = started
    pool.run(job, lambda _: None)
    assert used == [first]
    assert set(started) == set(pool._workers)

    before = len(started)
    pool.run(job, lambda _: None)
    assert len(started) == before


def test_a_process_imports_nothing_from_the_folder_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    for name in ("torch.py", "tasks/__init__.py", "tasks/worker.py"):
        (tmp_path / name).write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    pool = WorkerPool([Slot("cpu", None, 1)], said.append)
    pool.start()
    pool.close()
    assert (said, (tmp_path / "ran").exists()) == ([], False)


def test_a_process_sees_its_gpu_and_threads_and_not_the_run_of_the_flow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MLFLOW_RUN_ID"]
    (tmp_path / "sitecustomize.py").write_text(
        "import json, os, pathlib\n"
        f"seen = [os.environ.get(name) for name in {names}]\n"
        f"pathlib.Path({str(tmp_path / 'seen')!r}).write_text(json.dumps(seen))\n"
        "os._exit(0)\n"
    )
    for name, value in zip(["PYTHONPATH", *names], [str(tmp_path), "0,1,2,3", "7", "of the flow"], strict=True):
        monkeypatch.setenv(name, value)
    worker = WorkerProcess(Slot("cuda", "3", 2), lambda _: None, 1.0)
    worker.start()
    assert worker._process is not None
    worker._process.wait(30)
    assert json.loads((tmp_path / "seen").read_text()) == ["3", "2", None]


def test_a_process_takes_itself_for_none_of_those_that_a_launcher_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (accelerate,) = importlib.util.find_spec("accelerate").submodule_search_locations  # type: ignore[union-attr,misc]
    sources = "".join((Path(accelerate) / name).read_text() for name in ("state.py", "utils/environment.py"))
    read = set(re.findall(r'"((?:\w+_)?(?:RANK|SIZE|LOCALRANKID|LOCALNRANKS|MASTER_ADDR|MASTER_PORT))"', sources))
    assert {"RANK", "PMI_SIZE", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MASTER_PORT"} < read
    theirs = [*read, "NODE_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP", "ACCELERATE_TORCH_DEVICE"]
    ours = ["PYTHONPATH", "GLOO_SOCKET_IFNAME", "SLURM_JOB_ID", "OMPI_MCA_btl", "RANKING"]
    (tmp_path / "sitecustomize.py").write_text(
        "import json, os, pathlib\n"
        f"pathlib.Path({str(tmp_path / 'seen')!r}).write_text(json.dumps(list(os.environ)))\n"
        "os._exit(0)\n"
    )
    for name in (*theirs, *ours):
        monkeypatch.setenv(name, str(tmp_path))
    worker = WorkerProcess(Slot("cpu", None, 1), lambda _: None, 1.0)
    worker.start()
    assert worker._process is not None
    worker._process.wait(30)
    seen = json.loads((tmp_path / "seen").read_text())
    assert sorted({*theirs} & {*seen}) == []
    assert {*ours} < {*seen}


@pytest.mark.parametrize(("given", "seconds"), [("", 27), ("600", 602)])
def test_a_process_is_waited_for_a_little_longer_than_its_checkpoint(
    given: str, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEME_STOP_SECONDS", given)
    left: list[float] = []
    monkeypatch.setattr(WorkerProcess, "close", lambda _, deadline: left.append(deadline - time.monotonic()))
    pool = WorkerPool([Slot("cpu", None, 1)])
    pool.close()
    assert [round(number) for number in left] == [seconds]
    assert pool._workers[0]._seconds_to_stop == seconds, "as long as where Ctrl-C is told to it"


def test_a_time_for_checkpoints_that_is_none_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_STOP_SECONDS", "soon")
    with pytest.raises(InputError, match="DEME_STOP_SECONDS is soon"):
        WorkerPool([Slot("cpu", None, 1)])


def test_a_worker_gives_its_checkpoint_the_seconds_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import time, tasks.jobs, tasks.work.base\n"
        "def execute(job, context, report, *_):\n"
        "    report({'message': 'begun'})\n"
        "    time.sleep(60)\n"
        "tasks.work.base.execute = execute\n"
        "tasks.jobs.ImportJob.leaves_checkpoints = True\n"
    )
    for name, value in {"PYTHONPATH": tmp_path, "DEME_HOME": tmp_path, "DEME_STOP_SECONDS": "0.5"}.items():
        monkeypatch.setenv(name, str(value))
    pool = WorkerPool([Slot("cpu", None, 1)])
    told: list[float] = []

    def take_away(_: Any) -> None:
        told.append(time.monotonic())
        assert pool._workers[0]._process is not None
        pool._workers[0]._process.terminate()

    try:
        with pytest.raises(WorkerDiedError, match="left with status 75"):
            pool.run(ImportJob(source="model"), take_away)
    finally:
        pool.close()
    assert 0.5 <= time.monotonic() - told[0] < 10


@pytest.fixture
def pool_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], WorkerPool]]:
    """Makes a pool whose process does these statements in place of its jobs."""
    pools: list[WorkerPool] = []

    def make(statements: str) -> WorkerPool:
        (tmp_path / "sitecustomize.py").write_text(
            f"import torch, tasks.work.base\ndef execute(*_):\n    {statements}\ntasks.work.base.execute = execute\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("DEME_HOME", str(tmp_path))
        pools.append(WorkerPool([Slot("cpu", None, 1)]))
        return pools[0]

    yield make
    for pool in pools:
        pool.close()


def test_a_gpu_with_too_little_memory_is_one_sentence(pool_that_fails: Callable[[str], WorkerPool]) -> None:
    reason = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"
    pool = pool_that_fails(f"raise torch.OutOfMemoryError({reason!r})")
    with pytest.raises(GpuMemoryError) as caught:
        pool.run(ImportJob(source="model"), lambda _: None)
    assert str(caught.value) == (
        "The GPU has too little memory for pretrained (CUDA out of memory); use one with more."
    )


def test_a_process_that_is_still_joined_to_others_does_no_other_job(
    pool_that_fails: Callable[[str], WorkerPool],
) -> None:
    pool = pool_that_fails("torch.distributed.is_initialized = lambda: True; raise OSError('the store is away')")
    for _ in range(2):
        with pytest.raises(DemeError, match="the store is away"):
            pool.run(ImportJob(source="model"), lambda _: None)
        process = pool._workers[0]._process
        assert process is not None and process.poll() is not None


def test_there_is_a_slot_for_each_gpu_and_for_each_group_that_a_training_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    singles = ["0", "1", "2", "3", "4"]
    assert [slot.gpu for slot in plan_slots(ExecutionSpec())] == singles
    assert [slot.gpu for slot in plan_slots(ExecutionSpec(), 2, 1)] == [*singles, "0,1", "2,3"]
    assert [slot.gpu for slot in plan_slots(ExecutionSpec(), 4, 2)] == [*singles, "0,1", "2,3", "0,1,2,3"]
    assert [slot.gpu for slot in plan_slots(ExecutionSpec(num_workers=2))] == ["0", "1"]
    with pytest.raises(InputError, match="num_processes is 6, but this machine shows 5 GPUs"):
        plan_slots(ExecutionSpec(), 6)
    assert [slot.device for slot in plan_slots(ExecutionSpec(device="cpu", num_workers=2))] == ["cpu", "cpu"]


def test_what_others_wait_for_goes_before_images_for_the_report(bench: BenchMaker) -> None:
    here = bench("0")
    sent = [here.send("first")]
    sent += [here.send("image", can_wait=True), here.send("images", can_wait=True), here.send("candidate")]
    for name in ("first", "candidate", "image", "images"):
        until(lambda name=name: here.began[-1][0] == name)
        here.end(name)
    for future in sent:
        future.result(30)


def test_two_runs_take_different_gpus_and_wait_for_one_another(bench: BenchMaker) -> None:
    ours, theirs = bench("0,1"), bench("0,1")
    ours.send("a")
    theirs.send("b")
    until(lambda: bool(ours.began and theirs.began))
    assert {ours.began[0][1], theirs.began[0][1]} == {"0", "1"}
    waiting = ours.send("c")
    assert len(ours.began) == 1
    theirs.end("b")
    until(lambda: len(ours.began) == 2)
    assert ours.began[1] == ("c", theirs.began[0][1])
    ours.end("c")
    waiting.result(30)


def test_a_job_that_waits_for_another_runs_gpu_says_so_once_and_goes_on_waiting(
    bench: BenchMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(worker_pool, "_SECONDS_BETWEEN_LOOKS", 0.05)
    ours, theirs = bench("0,1"), bench("0,1")
    for name in ("a", "b"):
        theirs.send(name)
    until(lambda: len(theirs.began) == 2)
    waiting = ours.send("c")
    time.sleep(0.2)
    assert ours.said == [], "it may be free in a moment"
    until(lambda: bool(ours.records))
    time.sleep(0.7)
    assert ours.said == ["fake waits for GPU 0 or 1, in use by other runs of this machine"]
    assert ours.records == [progress.waiting("GPU 0 or 1, in use by other runs of this machine")]
    theirs.end("a")
    until(lambda: bool(ours.began))
    assert ours.records[1:] == [{"message": f"on GPU {ours.began[0][1]}"}]
    ours.end("c")
    waiting.result(30)


def test_a_job_that_waits_for_its_own_run_says_nothing(bench: BenchMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(worker_pool, "_SECONDS_BETWEEN_LOOKS", 0.05)
    here = bench("0,1", num_processes=2)
    here.send("candidate")
    until(lambda: bool(here.began))
    training = here.send("training", num_processes=2)
    here.send("behind it")
    time.sleep(0.5)
    here.end("candidate")
    until(lambda: len(here.began) == 2)
    here.end("training")
    training.result(30)
    assert (here.said, here.records) == ([], [])


def test_who_cannot_have_all_gpus_holds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_lock, "FOLDER", tmp_path)
    second = GpuLock(["1"])
    assert second.try_acquire()
    both = GpuLock(["0", "1"])
    assert not both.try_acquire()
    assert GpuLock(["0"]).try_acquire()


def test_a_gpu_is_held_against_all_users_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_lock, "FOLDER", tmp_path)
    before, ours = os.umask(0o077), GpuLock(["GPU-5e7e"])
    try:
        assert ours.try_acquire()
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o644, "others must be able to open it"
    assert not GpuLock(["GPU-5e7e"]).try_acquire()
    ours.release()
    assert GpuLock(["GPU-5e7e"]).try_acquire()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to("/etc/passwd")])
def test_a_link_in_place_of_a_gpus_lock_is_said(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_lock, "FOLDER", tmp_path)
    make(tmp_path / "deme-gpu-1.lock")
    both = GpuLock(["0", "1"])
    with pytest.raises(InputError, match=r"lock .*deme-gpu-1\.lock cannot be opened .*; remove it"):
        both.try_acquire()
    assert GpuLock(["0"]).try_acquire(), "who cannot have all holds none"


def test_a_training_on_many_gpus_waits_for_all_of_them_and_is_not_passed(bench: BenchMaker) -> None:
    here = bench("0,1", num_processes=2)
    here.send("candidate")
    until(lambda: bool(here.began))
    here.send("training", num_processes=2)
    here.send("later")
    assert [name for name, _ in here.began] == ["candidate"], "the other GPU is kept for the training"
    here.end("candidate")
    until(lambda: len(here.began) == 2)
    assert here.began[1] == ("training", "0,1")
    assert {"0", "1"} <= set(here.dismissed), "idle processes would keep memory on its GPUs"
    here.dismissed.clear()
    here.end("training")
    until(lambda: len(here.began) == 3)
    assert here.dismissed == ["0,1"]


def test_no_process_starts_after_the_pool_has_closed() -> None:
    pool = WorkerPool([Slot("cpu", None, 1)])
    job: Any = FakeJob("late")
    with pytest.raises(DemeError, match="ended before the job did"):
        pool.run(job, lambda _: None, on_start=pool.close)
    assert pool._workers[0]._process is None


def test_who_waits_when_the_pool_closes_is_told(bench: BenchMaker) -> None:
    here = bench("0")
    here.send("first")
    waiting = here.send("second")
    here.pool.close()
    with pytest.raises(DemeError, match="ended before the job did"):
        waiting.result(30)


def test_a_job_for_more_gpus_than_any_worker_has_is_refused(bench: BenchMaker) -> None:
    with pytest.raises(InputError, match="num_processes is 4, but no worker here has so many"):
        bench("0,1").pool.run(FakeJob("wide", num_processes=4), lambda _: None)  # type: ignore[arg-type]
