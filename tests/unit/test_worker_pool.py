"""The worker pool: which processes it starts, and when."""

from pathlib import Path
from typing import Any

import pytest

from tasks.worker_pool import Slot, WorkerPool, _Worker


def test_the_first_job_finds_its_process_started_and_the_others_start_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[_Worker] = []
    used: list[_Worker] = []
    monkeypatch.setattr(_Worker, "start", lambda worker: started.append(worker))
    monkeypatch.setattr(_Worker, "run", lambda worker, *_: used.append(worker))
    pool = WorkerPool([Slot("cpu", None, 1)] * 3)
    job: Any = "a job"

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
