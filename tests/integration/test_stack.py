"""The parts of the local stack that need no server: ports, credentials, processes, state."""

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from deme_core.errors import DemeError, InputError
from flows.stack.credentials import load_credentials
from flows.stack.ports import NAMES, choose_ports, is_free
from flows.stack.processes import (
    STACK_VARIABLE,
    ProcessRecord,
    find_started_by,
    ports_of_other_stacks,
    start_detached,
    stop_tree,
    who_listens,
)
from flows.stack.services import Service
from flows.stack.stack import Stack
from flows.stack.startup import DeployStart, ServiceStart, wait_for
from tasks.health import check_health


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_every_service_has_a_free_port_of_its_own() -> None:
    ports = choose_ports({}, {})
    assert set(ports) == set(NAMES)
    assert len(set(ports.values())) == len(NAMES)
    assert all(is_free(port, name) for name, port in ports.items())


def test_ports_stay_as_they_were() -> None:
    ports = choose_ports({}, {})
    assert choose_ports({}, ports) == ports


def test_a_port_that_was_taken_since_is_replaced(taken_port: int) -> None:
    assert choose_ports({}, {"mlflow": taken_port})["mlflow"] != taken_port


def test_a_port_asked_for_and_taken_names_who_has_it(taken_port: int) -> None:
    with pytest.raises(InputError, match=rf"Port {taken_port} for mlflow is taken by .*{os.getpid()}"):
        choose_ports({"mlflow": taken_port}, {})


def test_a_service_that_runs_keeps_its_port(taken_port: int) -> None:
    assert choose_ports({}, {"mlflow": taken_port}, ["mlflow"])["mlflow"] == taken_port
    with pytest.raises(InputError, match="`deme down` first"):
        choose_ports({"mlflow": taken_port + 1}, {"mlflow": taken_port}, ["mlflow"])


def test_a_port_that_a_worker_of_a_killed_stack_still_asks_is_not_taken(tmp_path: Path) -> None:
    port = choose_ports({}, {})["s3_master"]  # Any free one, not one of the usual.
    environment = os.environ | {STACK_VARIABLE: "killed", "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    _, left = start_detached(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        environment=environment,
        folder=tmp_path,
        log=tmp_path / "log",
    )
    try:
        foreign = ports_of_other_stacks(str(tmp_path))
        assert str(left.pid) in foreign[port]
        assert port not in ports_of_other_stacks("killed")
        assert choose_ports({}, {"prefect": port}, (), foreign)["prefect"] != port
        with pytest.raises(InputError, match=rf"Port {port} for prefect is taken by .*{left.pid}"):
            choose_ports({"prefect": port}, {}, (), foreign)
    finally:
        left.kill()
        left.wait()


def test_an_s3_port_needs_its_grpc_port_too(taken_port: int) -> None:
    if taken_port > 20_000:
        assert not is_free(taken_port - 10_000, "s3")
    assert not is_free(taken_port, "mlflow")


def test_credentials_are_made_once_and_are_private(tmp_path: Path) -> None:
    path = tmp_path / "stack" / "credentials.json"
    first = load_credentials(path)
    assert load_credentials(path) == first
    assert load_credentials(tmp_path / "other.json") != first
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(first.secret_key) >= 32
    assert first.secret_key not in repr(first)
    assert len(first.prefect_password) >= 32
    assert first.prefect_password not in repr(first)


def test_credentials_of_before_keep_their_keys_and_get_what_they_lack(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.write_text('{"access_key": "deme-a", "secret_key": "b"}')
    found = load_credentials(path)
    assert (found.access_key, found.secret_key) == ("deme-a", "b")
    assert load_credentials(path) == found
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["[]", "{", '{"user": "deme"}'])
def test_a_file_that_holds_no_credentials_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"credentials\.json holds no credentials"):
        load_credentials(path)


def test_a_process_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    sleep = "import time; time.sleep(60)"
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleep}']); {sleep}"
    environment = os.environ | {STACK_VARIABLE: str(tmp_path)}
    record, _ = start_detached(
        [sys.executable, "-c", script], environment=environment, folder=tmp_path, log=tmp_path / "logs" / "x.log"
    )
    process = record.find()
    assert process is not None
    while len(family := find_started_by(str(tmp_path))) < 2:
        assert process.is_running()
    stop_tree(process, seconds=5)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert record.find() is None


def test_a_pid_that_was_given_to_another_process_is_not_ours(tmp_path: Path) -> None:
    created = ProcessRecord.of(os.getpid()).created
    record, process = start_detached(
        [sys.executable, "-c", "input()"], environment=os.environ, folder=tmp_path, log=tmp_path / "log"
    )
    process.wait()
    assert record.find() is None
    assert replace(record, pid=os.getpid(), created=created).find() is not None
    assert replace(record, pid=os.getpid(), created=created - 3600).find() is None


@pytest.mark.parametrize("seconds", [-86_400, 3600])
def test_a_process_is_known_after_the_clock_was_set(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    record = ProcessRecord.of(os.getpid())
    boot_time, created = psutil.boot_time(), psutil.Process().create_time()
    monkeypatch.setattr(f"{psutil.Process()._proc.__class__.__module__}.boot_time", lambda: boot_time + seconds)
    assert abs(psutil.Process().create_time() - created - seconds) < 2, "psutil tells another time now"
    assert record.find() is not None


def test_who_listens_is_told_by_name_and_pid(taken_port: int) -> None:
    found = who_listens(taken_port)
    assert found is not None
    assert f"(pid {os.getpid()})" in found


def test_what_answers_must_be_what_was_started(taken_port: int, tmp_path: Path) -> None:
    # As when another stack, started at the same moment, got the same port.
    url, log = f"http://127.0.0.1:{taken_port}", tmp_path / "log"
    service = Service(name="mlflow", url=url, command=(), environment={}, check=lambda: None)
    _, ours = start_detached([sys.executable, "-c", "input()"], environment=os.environ, folder=tmp_path, log=log)
    with pytest.raises(DemeError, match=f"mlflow cannot have port {taken_port}.*pid {os.getpid()}"):
        ServiceStart(service, ours, log).is_ready()
    ours.wait()
    assert ServiceStart(service, None, log).is_ready(), "it ran before: nothing to compare"


def test_nothing_was_started_yet(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    assert {service.state for service in stack.status()} == {"stopped"}
    assert stack.down() == []
    with pytest.raises(InputError, match="`deme up` starts one"):
        stack.layout()


def test_keys_that_are_gone_are_not_made_anew_for_a_server_that_runs(tmp_path: Path) -> None:
    ours = ProcessRecord.of(os.getpid())
    entry = {**asdict(ours), "since": "2026-01-01T00:00:00+00:00", "url": "http://127.0.0.1:1"}
    state = {"ports": choose_ports({}, {}), "services": {"s3": entry}}
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "state.json").write_text(json.dumps(state))
    stack = Stack(tmp_path)
    for ask in (stack.layout, stack.status, lambda: stack.up({}, gpu=False)):
        with pytest.raises(InputError, match=r"credentials\.json is gone, and the S3 server runs with its keys"):
            ask()
    assert not (tmp_path / "stack" / "credentials.json").exists()


def test_a_service_whose_pid_is_gone_has_died(tmp_path: Path) -> None:
    entry = {"pid": os.getpid(), "created": 0.0, "since": "2026-01-01T00:00:00+00:00", "url": "http://127.0.0.1:1"}
    state = {"ports": choose_ports({}, {}), "services": {"mlflow": entry}}
    folder = tmp_path / "stack"
    (folder / "logs").mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "logs" / "mlflow.log").write_text("starting\nOut of memory\n\n")
    mlflow = next(service for service in Stack(tmp_path).status() if service.name == "mlflow")
    assert mlflow.state == "died"
    assert mlflow.problem
    assert "Out of memory" in mlflow.problem
    assert "`deme up`" in mlflow.problem


def test_a_damaged_state_is_said(tmp_path: Path) -> None:
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "state.json").write_text("{")
    with pytest.raises(DemeError, match=r"state\.json is damaged"):
        Stack(tmp_path).status()


def start_service(folder: Path, script: str, ready: Path) -> ServiceStart:
    """Starts Python with a script; the service is ready when it has written the file ``ready``."""
    service = Service("toy", "nowhere", (sys.executable, "-c", script), os.environ, lambda: ready.read_text() and None)
    log = folder / "toy.log"
    _, process = start_detached(service.command, environment=service.environment, folder=folder, log=log)
    return ServiceStart(service, process, log)


def test_what_is_starting_is_waited_for(tmp_path: Path) -> None:
    script = "import pathlib, time; time.sleep(0.5); pathlib.Path('ready').write_text('yes'); time.sleep(60)"
    start = start_service(tmp_path, script, tmp_path / "ready")
    assert not start.is_ready()
    wait_for([start])
    assert start.is_ready()
    start.process.kill()
    start.process.wait()
    assert start.is_ready(), "asked again, a service that was ready once is not waited for"


def test_whatever_fails_beside_ends_the_waiting(tmp_path: Path) -> None:
    slow = start_service(tmp_path, "import time; time.sleep(60)", tmp_path / "never")
    failing = start_service(tmp_path, "raise SystemExit('no space left')", tmp_path / "never")
    try:
        with pytest.raises(DemeError, match="toy stopped at its start: no space left"):
            wait_for([slow], beside=[failing])
    finally:
        slow.process.kill()
        slow.process.wait()


def test_a_registration_that_fails_is_told_and_one_that_waits_is_ended(tmp_path: Path, taken_port: int) -> None:
    environment = os.environ | {"DEME_HOME": str(tmp_path)}
    environment.pop("PREFECT_API_URL", None)
    with DeployStart(environment, tmp_path / "log") as start, pytest.raises(DemeError, match="no PREFECT_API_URL"):
        wait_for([start])
    # Nothing answers on this port: it would wait for minutes.
    address = {"PREFECT_API_URL": f"http://127.0.0.1:{taken_port}/api"}
    with DeployStart(environment | address, tmp_path / "log") as start:
        assert not start.is_ready()
    assert start.process.poll() is not None


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_a_server_that_is_starting_is_waited_for_if_asked() -> None:
    address = f"http://127.0.0.1:{choose_ports({}, {})['mlflow']}"
    with pytest.raises(InputError, match="does not answer"):
        check_health("PREFECT_API_URL", address)
    servers: list[HTTPServer] = []

    def serve() -> None:
        servers.append(HTTPServer(("127.0.0.1", int(address.rpartition(":")[2])), _Healthy))
        servers[0].serve_forever()

    starting = threading.Timer(0.5, serve)
    starting.start()
    check_health("PREFECT_API_URL", address, patience=30)
    servers[0].shutdown()
    servers[0].server_close()
    starting.join()


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_server_that_wants_a_log_in_is_there(status: int) -> None:
    class Refusing(_Healthy):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        if status < 500:
            check_health("PREFECT_API_URL", address)
        else:
            with pytest.raises(InputError, match="does not answer"):
                check_health("PREFECT_API_URL", address)
        server.shutdown()
