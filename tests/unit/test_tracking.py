from typing import Any

import pytest

from tasks import tracking
from tasks.tracking import Tracker, TrainingLog


class Recorder(Tracker):
    """A tracker that keeps what it is given instead of sending it."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def log_training(self, run_id: str, records: Any) -> None:
        self.calls.append([record["global_step"] for record in records])


def test_training_records_go_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    log = TrainingLog(recorder, "run")
    for step in (10, 20):
        log.add({"global_step": step})
    assert recorder.calls == []
    monkeypatch.setattr(tracking, "_SECONDS_BETWEEN_RECORDS", 0.0)
    log.add({"global_step": 30})
    log.flush()
    assert recorder.calls == [[10, 20, 30]]


def test_what_a_resumed_training_did_before_is_added_once() -> None:
    recorder = Recorder()
    log = TrainingLog(recorder, "run")
    log.add({"global_step": 30})
    log.complete([{"global_step": step} for step in (10, 20, 30)])
    log.complete([{"global_step": 30}])
    assert sorted(step for call in recorder.calls for step in call) == [10, 20, 30]
