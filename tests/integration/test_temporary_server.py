import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

import httpx
import psutil
import pytest

# What a command does, and then how it can be reached.
_COMMAND = """
from flows.environment import make_folders
from flows.temporary_server import TemporaryServer
make_folders()
server = TemporaryServer()
server.connect()
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL
print(PREFECT_API_URL.value(), PREFECT_API_AUTH_STRING.value(), flush=True)
input()
"""
_SECONDS_TO_END = 15.0


@contextlib.contextmanager
def command(home: Path, variables: Mapping[str, str]) -> Iterator["subprocess.Popen[str]"]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DEME_"))}
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**kept, "DEME_HOME": str(home), **variables},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _read(process: "subprocess.Popen[str]") -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def _check_end(server: psutil.Process) -> None:
    """Raises TimeoutError unless it ends in time; whether anybody asks how does not matter."""
    deadline = time.monotonic() + _SECONDS_TO_END
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.1)


@pytest.mark.parametrize("ending", [signal.SIGKILL, None])
def test_it_asks_for_a_password_and_ends_with_the_command_alone(tmp_path: Path, ending: signal.Signals | None) -> None:
    with command(tmp_path, {}) as process:
        url, login = _read(process)
        (server,) = psutil.Process(process.pid).children()
        assert {connection.laddr.ip for connection in server.net_connections("tcp")} == {"127.0.0.1"}
        for number in (signal.SIGINT, signal.SIGTERM):  # As a terminal or a cluster sends them to all.
            server.send_signal(number)
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert client.post("/flows/filter", json={}).status_code == HTTPStatus.UNAUTHORIZED
            auth = httpx.BasicAuth(*login.split(":"))
            assert client.post("/flows/filter", json={}, auth=auth).json() == []
        if ending:
            process.send_signal(ending)
        else:
            process.communicate("\n")
        _check_end(server)


@pytest.mark.parametrize("place", ["profile", "file"])
def test_it_makes_way_for_a_server_that_prefects_settings_name(tmp_path: Path, place: str) -> None:
    url = "http://127.0.0.1:9/api"
    if place == "profile":
        path = tmp_path / "prefect" / "profiles.toml"
        path.parent.mkdir()
        path.write_text(f'active = "ours"\n[profiles.ours]\nPREFECT_API_URL = "{url}"\n')
    else:
        path = tmp_path / "prefect.toml"
        path.write_text(f'[api]\nurl = "{url}"\n')
    with contextlib.chdir(tmp_path), command(tmp_path, {}) as process:
        assert _read(process) == [url, "None"]
        for server in psutil.Process(process.pid).children():
            _check_end(server)
