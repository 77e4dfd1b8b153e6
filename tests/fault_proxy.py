"""A proxy on loopback that passes HTTP requests on, unchanged, to a real server, and commits the faults it is told to.

Requests keep their Host, so that their signatures hold.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import urlsplit

# An answer of that status and code, instead of the server's; or:
#   hang         no answer for as long as the client waits
#   cut          the connection is closed before the server has the request
#   lost answer  the server does what was asked, and the client never learns
#   truncated    the connection is closed in the middle of the answer's body
#   short        half of the body, as if it were all
#   flipped      one bit of the body is another
#   kill …       the client dies: before the server has the request, within its body, after the server did it
Kind = Literal[
    "InternalError",
    "ServiceUnavailable",
    "SlowDown",
    "hang",
    "cut",
    "lost answer",
    "truncated",
    "short",
    "flipped",
    "kill before",
    "kill within",
    "kill after",
]
_STATUS = {"InternalError": 500, "ServiceUnavailable": 503, "SlowDown": 503}
_NOT_PASSED_ON = {"expect", "connection", "keep-alive", "transfer-encoding"}


@dataclass
class _Plan:
    kind: Kind
    matches: Callable[[str, str], bool]
    after: int
    times: int
    victim: int
    committed: list[str] = field(default_factory=list)


class FaultProxy:
    """Runs while it is entered.

    Args:
        target: URL of the real server.
    """

    def __init__(self, target: str) -> None:
        self.target, self._plan, self._lock = urlsplit(target), None, threading.Lock()
        self._plan: _Plan | None
        self.requests: list[tuple[str, str]] = []
        self.ending = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self._server.shutdown()
        self._server.server_close()

    def plan(
        self,
        kind: Kind | None,
        matches: Callable[[str, str], bool] = lambda method, path: True,
        *,
        after: int = 0,
        times: int = 1,
        victim: int = 0,
    ) -> list[str]:
        """Commits a fault from now on, instead of the one planned before; none for None.

        Args:
            kind: what to do.
            matches: to requests of which method and path.
            after: how many of them to let pass first.
            times: to how many of them.
            victim: the process to kill.

        Returns:
            A list that the requests are added to that it was committed to.
        """
        with self._lock:
            self._plan = None if kind is None else _Plan(kind, matches, after, times, victim)
            return self._plan.committed if self._plan else []

    def fault_of(self, method: str, path: str) -> _Plan | None:
        with self._lock:
            self.requests.append((method, path))
            plan = self._plan
            if plan is None or not plan.matches(method, path):
                return None
            if plan.after > 0:
                plan.after -= 1
                return None
            if plan.times == 0:
                return None
            plan.times -= 1
            plan.committed.append(f"{method} {path}")
            return plan


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    timeout = 60

    def _handle(self) -> None:
        plan = self.owner.fault_of(self.command, self.path)
        kind = plan.kind if plan else None
        if kind == "kill before":
            return self._kill(plan)
        if kind == "kill within":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._kill(plan)
        body = self._read_body()
        if kind == "hang":
            self._wait_for_client()
            return self._cut()
        if kind == "cut":
            return self._cut()
        if kind in _STATUS:
            text = (
                f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{kind}</Code><Message>on purpose</Message></Error>'
            )
            return self._answer(_STATUS[kind], [("Content-Type", "application/xml")], text.encode())
        try:
            response, answer = self._forward(body)
        except (OSError, HTTPException):
            return self._cut()
        if kind == "kill after":
            return self._kill(plan)
        if kind == "lost answer":
            return self._cut()
        if kind == "short":
            answer = answer[: len(answer) // 2]
        if kind == "flipped" and answer:
            answer = bytes([answer[0] ^ 1]) + answer[1:]
        headers = [(k, v) for k, v in response.getheaders() if k.lower() not in {*_NOT_PASSED_ON, "content-length"}]
        if self.command == "HEAD":
            headers.append(("Content-Length", response.getheader("Content-Length") or "0"))
        self._answer(response.status, headers, answer, truncated=kind == "truncated")
        return None

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _handle  # noqa: N815

    def _read_body(self) -> bytes:
        if (self.headers.get("Transfer-Encoding") or "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        target = self.owner.target
        connection = HTTPConnection(target.hostname or "", target.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _NOT_PASSED_ON and name.lower() != "content-length":
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, truncated: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if truncated else body)
        if truncated:
            self._cut()

    def _cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _kill(self, plan: Any) -> None:
        os.kill(plan.victim, signal.SIGKILL)
        self._cut()

    def _wait_for_client(self) -> None:
        """Waits until the client closes its end."""
        self.connection.settimeout(0.1)
        while not self.owner.ending.is_set():
            try:
                if not self.connection.recv(1, socket.MSG_PEEK):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def log_message(self, *_: object) -> None:
        """Says nothing."""
