"""What the benchmark of `make demo` asks the stack's Prefect server, which wants a login."""

import json
from base64 import b64encode
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from benchmarks.demo import ask_when_it_began
from tests.http_server import serving, url_of

LOGIN = "deme:a:password"


class PrefectServer(BaseHTTPRequestHandler):
    """Knows one flow run, and one task of it; tells nobody who does not log in."""

    def do_GET(self) -> None:
        self._answer({"start_time": "2026-11-28T12:00:00Z"} if self.path == "/api/flow_runs/flow-run" else None)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_of_run = self.path == "/api/task_runs/filter" and asked["flow_runs"] == {"id": {"any_": ["flow-run"]}}
        self._answer([{"start_time": "2026-11-28T12:00:02.500000+00:00"}] if is_of_run else None)

    def _answer(self, content: Any) -> None:
        is_known = self.headers["Authorization"] == f"Basic {b64encode(LOGIN.encode()).decode()}"
        body = json.dumps(content).encode()
        self.send_response(401 if not is_known else 404 if content is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_the_stacks_server_is_asked_with_its_login_and_past_any_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(PrefectServer) as server:
        shell = {"PREFECT_API_URL": f"{url_of(server)}/api", "PREFECT_API_AUTH_STRING": LOGIN}
        began, first_task_began = ask_when_it_began("flow-run", shell)
    assert (began, first_task_began - began) == (1795867200.0, 2.5)
