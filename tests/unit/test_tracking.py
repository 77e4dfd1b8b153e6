import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deme_core.errors import InputError, TrackingUnavailableError
from deme_core.settings import Settings
from tasks import training_log
from tasks.databases import start_from_copy
from tasks.mlflow_client import check_address, is_database, mlflow_client
from tasks.patient_client import OrderlyClient, PatientClient, patient_client
from tasks.tracked_runs import check_tracking, find_tag
from tasks.tracking import _TRAINING_METRICS, Tracker
from tasks.training_log import TrainingLog
from tests.http_server import serving, url_of


class Recorder(Tracker):
    """A tracker that keeps what it is given instead of sending it, unless it is away."""

    def __init__(self, *, num_failures: int = 0) -> None:
        self.calls: list[list[tuple[int, int]]] = []
        self.num_failures, self.num_asked = num_failures, 0
        self.ended: str | None = None

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        self.ended = status

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
    ended = time.time() * 1000
    while recorder.num_asked < 3:
        time.sleep(0.005)
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
    log.abandon("KILLED")
    assert recorder.steps == [[10]]
    assert recorder.ended == "KILLED"


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
    assert recorder.ended is None


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
        "http://127.0.0.1:1/?token=hush",
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


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("postgresql://user:pass@host/db", True),
        ("mysql+pymysql://user:pass@host/db", True),
        ("mssql+pyodbc://user:pass@host/db", True),
        ("sqlite:///mlflow.db", True),
        ("sqlite+pysqlite:///mlflow.db", True),
        ("http://127.0.0.1:5000", False),
        ("file:///data/mlruns", False),
        ("sqlite_runs", False),
    ],
)
def test_a_database_is_told_from_a_server_or_folder(uri: str, expected: bool) -> None:
    assert is_database(uri) is expected


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings for a database that is no default one, in an empty working folder."""
    start_from_copy("mlflow", tmp_path / "runs.db")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite+pysqlite:///{tmp_path / 'runs.db'}"
    return {"DEME_HOME": str(tmp_path / "my home"), "MLFLOW_TRACKING_URI": uri}


def test_files_of_a_run_last_whatever_database_is_read(database: dict[str, str], tmp_path: Path) -> None:
    tracker = Tracker(Settings.model_validate(database), experiment="race", run_name="race", flow_run_id="flow")
    tracker.log_text(tracker.run_id, "scores", "report.txt")
    (found,) = tmp_path.rglob("report.txt")
    assert found.is_relative_to(tmp_path / "my home" / "mlartifacts")


UI = "https://mlflow.example.org/"


def test_an_experiment_that_another_run_makes_in_between_is_taken(
    database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.model_validate(database)
    tracker = Tracker(settings, experiment="new", run_name="first", flow_run_id="flow")
    looks, find = [None], tracker._client.get_experiment_by_name
    late = lambda name: looks.pop() if looks else find(name)  # noqa: E731
    monkeypatch.setattr(tracker._client, "get_experiment_by_name", late, raising=False)
    assert tracker._find_experiment(settings, "new") == tracker._experiment_id
    assert not looks


def test_what_browsers_open_decides_nothing_but_links(database: dict[str, str]) -> None:
    settings = Settings.model_validate({**database, "DEME_MLFLOW_UI_URL": UI})
    assert settings.mlflow_ui_url == UI.rstrip("/")
    assert type(patient_client(settings)) is OrderlyClient
    server = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    for ui in ({}, {"DEME_MLFLOW_UI_URL": UI}, {"DEME_MLFLOW_UI_URL": ""}):
        assert type(patient_client(Settings.model_validate(server | ui))) is PatientClient


@pytest.mark.parametrize("ui", ["https://user:hush@mlflow.example.org", "https://hush@host/path", "//user:hush@host"])
def test_a_password_that_pages_would_link_to_is_refused(ui: str) -> None:
    settings = Settings.model_validate({"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000", "DEME_MLFLOW_UI_URL": ui})
    with pytest.raises(InputError, match=r"^DEME_MLFLOW_UI_URL must hold no password") as caught:
        check_address(settings)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "sqlite:///mlflow.db"])
@pytest.mark.parametrize("ui", ["mlflow.example.org", "127.0.0.1:5000", "httpd", "ftp://host"])
def test_an_address_that_no_browser_opens_is_refused(uri: str, ui: str) -> None:
    settings = Settings.model_validate({"MLFLOW_TRACKING_URI": uri, "DEME_MLFLOW_UI_URL": ui})
    with pytest.raises(InputError, match=r"^DEME_MLFLOW_UI_URL must .*\.$"):
        check_address(settings)


def test_a_record_that_comes_while_others_are_sent_is_not_lost() -> None:
    class Slow(Recorder):
        def log_training(self, run_id: str, records: Any) -> None:
            super().log_training(run_id, records)
            if self.num_asked == 1:
                log.add({"global_step": 20})
                sent.set()

    recorder, sent = Slow(), threading.Event()
    log = TrainingLog(lambda: (recorder, "run"))
    log.add({"global_step": 10})
    assert sent.wait(10)
    log.complete([{"global_step": 10}, {"global_step": 20}])
    assert recorder.steps == [[10], [20]]


def test_every_number_of_a_training_is_logged_at_its_own_step() -> None:
    sent: list[list[Any]] = []
    tracker = Tracker.__new__(Tracker)
    tracker._client = SimpleNamespace(log_batch=lambda _, metrics: sent.append(metrics))  # type: ignore[assignment]
    records = [({"global_step": step} | dict.fromkeys(_TRAINING_METRICS, step / 2), step + 7) for step in range(400)]
    tracker.log_training("run", records)
    told = [(metric.key, metric.step, metric.value, metric.timestamp) for metrics in sent for metric in metrics]
    names = _TRAINING_METRICS.values()
    assert sorted(told) == sorted((name, step, step / 2, step + 7) for step in range(400) for name in names)
    assert max(map(len, sent)) <= 1000, "MLflow takes no more at once"


class _Answering(BaseHTTPRequestHandler):
    """Another server than MLflow's, or MLflow's behind something."""

    health, status, content = 404, 404, b"<html>Not Found</html>"

    def do_GET(self) -> None:
        self._answer(self.health, b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(self.status, self.content)

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


OTHERS = {
    "web server": (
        {},
        r"is not the address of an MLflow server: .* \(BaseHTTP.*\) answers with status 404; correct it",
    ),
    "web pages": ({"health": 200, "status": 200, "content": b"<html>"}, r"is not the address .* status 200"),
    "another API": ({"status": 404, "content": b'{"detail": "Not Found"}'}, r"is not the address .* status 404"),
    "no log-in": ({"health": 401, "status": 401}, r"wants a log-in \(status 401\): MLFLOW_TRACKING_USERNAME"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_server_that_is_not_mlflow_is_said_at_once(kind: str) -> None:
    settings, sentence = OTHERS[kind]
    with serving(type("Other", (_Answering,), settings)) as server:
        began = time.monotonic()
        with pytest.raises(InputError, match=f"^MLFLOW_TRACKING_URI {url_of(server)} {sentence}") as caught:
            check_tracking(Settings.model_validate({"MLFLOW_TRACKING_URI": url_of(server)}))
        assert time.monotonic() - began < 10
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "answers", [{"status": 200, "content": b"{}"}, {"status": 403, "content": b'{"error_code": "PERMISSION_DENIED"}'}]
)
def test_an_mlflow_without_a_page_of_health_is_taken(answers: dict[str, Any]) -> None:
    with serving(type("Hosted", (_Answering,), answers)) as server:
        check_tracking(Settings.model_validate({"MLFLOW_TRACKING_URI": url_of(server)}))


def test_the_tag_of_a_run_is_looked_for_only_where_mlflow_is() -> None:
    with serving(_Answering) as server, pytest.raises(InputError, match="is not the address of an MLflow server"):
        find_tag(Settings.model_validate({"MLFLOW_TRACKING_URI": url_of(server)}), "deme.merged.uri", None)
