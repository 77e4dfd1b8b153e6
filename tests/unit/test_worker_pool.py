"""The worker pool: which processes it starts, and when."""

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
