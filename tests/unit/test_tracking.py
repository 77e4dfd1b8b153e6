import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deme_core.errors import InputError, TrackingUnavailableError
from deme_core.settings import Settings
from tasks import training_log
from tasks.mlflow_client import check_address, mlflow_client
from tasks.patient_client import OrderlyClient
from tasks.tracking import Tracker
from tasks.training_log import TrainingLog


class Recorder(Tracker):
    """A tracker that keeps what it is given instead of sending it, unless it is away."""

    def __init__(self, *, num_failures: int = 0) -> None:
        self.calls: list[list[tuple[int, int]]] = []
        self.num_failures, self.num_asked = num_failures, 0
        self.failed = False

    def finish(self, run_id: str, *, failed: bool = False) -> None:
        self.failed = failed

    def log_training(self, run_id: str, records: Any) -> None:
        self.num_asked += 1
        if self.num_asked <= self.num_failures:
            raise TrackingUnavailableError("away")
        self.calls.append([(record["global_step"], came) for record, came in records])

    @property
    def steps(self) -> list[list[int]]:
        return [[step for step, _ in call] for call in self.calls]


def test_training_records_go_out_together() -> None:
    recorder = Recorder()
    log = TrainingLog(lambda: (recorder, "run"))
    for step in (10, 20, 30):
        log.add({"global_step": step})
    assert recorder.calls == []
    log.complete([])
    assert recorder.steps == [[10, 20, 30]]


def test_what_a_resumed_training_did_before_is_added_once() -> None:
    recorder = Recorder()
    log = TrainingLog(lambda: (recorder, "run"))
    log.add({"global_step": 30})
    log.complete([{"global_step": step} for step in (10, 20, 30)])
    assert sorted(step for call in recorder.steps for step in call) == [10, 20, 30]


def test_records_wait_for_a_server_that_is_away_and_keep_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_log, "_SECONDS_BETWEEN_RECORDS", 0.01)
    recorder = Recorder(num_failures=3)
    log = TrainingLog(lambda: (recorder, "run"))
    began = time.time() * 1000
    log.add({"global_step": 10})
    while recorder.num_asked < 3:
        time.sleep(0.005)
    ended = time.time() * 1000
    log.add({"global_step": 20})
    log.complete([{"global_step": 10}, {"global_step": 20}])
    told = dict(entry for call in recorder.calls for entry in call)
    assert sorted(told) == [10, 20]
    assert int(began) <= told[10] <= ended


def test_a_server_that_stays_away_is_an_error_once_the_training_is_done() -> None:
    recorder = Recorder(num_failures=10**9)
    log = TrainingLog(lambda: (recorder, "run"))
    log.add({"global_step": 10})
    with pytest.raises(TrackingUnavailableError):
        log.complete([])


def test_a_training_that_failed_does_not_wait_for_the_server() -> None:
    recorder = Recorder()
    log = TrainingLog(lambda: (recorder, "run"))
    log.add({"global_step": 10})
    log.abandon()
    assert recorder.steps == [[10]]
    assert recorder.failed


def test_a_training_begins_before_mlflow_knows_its_run() -> None:
    recorder, known = Recorder(), threading.Event()

    def start() -> tuple[Tracker, str]:
        known.wait()
        return recorder, "run"

    log = TrainingLog(start)
    log.add({"global_step": 10})
    assert recorder.num_asked == 0
    known.set()
    assert log.complete([{"global_step": 10}, {"global_step": 20}]) == "run"
    assert sorted(step for call in recorder.steps for step in call) == [10, 20]
    assert not recorder.failed


def test_a_training_whose_run_cannot_be_started_says_why() -> None:
    def start() -> tuple[Tracker, str]:
        raise InputError("no such experiment")

    log = TrainingLog(start)
    log.add({"global_step": 10})
    with pytest.raises(InputError, match="no such experiment"):
        log.complete([])
    with pytest.raises(
        InputError, match="no such experiment"
    ):  # So it does at the next record, of a training that goes on.
        log.add({"global_step": 20})


@pytest.mark.parametrize("num_turns", [1, 3])
def test_only_so_many_threads_talk_to_mlflow_at_once(num_turns: int) -> None:
    class Client:
        inside = most = 0

        def log(self, value: int) -> int:
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.005)
            self.inside -= 1
            return value

    client = Client()
    orderly = OrderlyClient(client, threading.Semaphore(num_turns))
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(orderly.log, range(24))) == list(range(24))
    assert 1 <= client.most <= num_turns


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:hush@127.0.0.1:1",
        "https://hush@127.0.0.1:1",
        "postgres://user:hush@host/db",
        "POSTGRESQL://user:hush@host/db",
        " postgresql://user:hush@host/db",
        "mssql+a+b://user:hush@host/db",
        "mysql+a_b://user:hush@host/db",
        "postgresql://user:hush",
        "sqlite://user:hush@host/db",
        "user:hush@host/db",
        "hush@host/db",
    ],
)
def test_an_address_that_would_be_repeated_with_its_password_is_refused(uri: str) -> None:
    settings = Settings.model_validate({"MLFLOW_TRACKING_URI": uri})
    with pytest.raises(InputError, match=r"^MLFLOW_TRACKING_URI must .*\.$") as caught:
        mlflow_client(settings)
    assert "hush" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "https://mlflow.example.org/path",
        "postgresql://user:pa%40ss@host:5432/db",
        "postgresql+psycopg2://user:p@ss@host/db",
        "mysql+pymysql://user:pass@host/db?charset=utf8",
        "mssql+pyodbc://user:pass@host/db?driver=ODBC+Driver+18",
        "sqlite:////data/my@home/mlflow.db",
        "sqlite:///mlflow.db",
        "file:///data/mlruns",
        "file:./mlruns",
        "mlruns",
        "./a:b@c",
    ],
)
def test_an_address_that_mlflow_knows_is_taken(uri: str) -> None:
    check_address(Settings.model_validate({"MLFLOW_TRACKING_URI": uri}))
