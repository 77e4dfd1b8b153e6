"""Progress bars in Prefect: they must not hold up the work."""

import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tasks import prefect_artifacts
from tasks.prefect_artifacts import progress_bar


class Server:
    """What Prefect's functions would tell it; it may be away for a while, or silent."""

    def __init__(self) -> None:
        self.shown: list[float] = []
        self.num_refusals = 0
        self.is_silent = threading.Event()
        self.answers = threading.Event()

    def create(self, *_: Any, **__: Any) -> object:
        self._answer()
        return uuid4()

    def update(self, _: Any, *, progress: float) -> None:
        self._answer()
        self.shown.append(progress)

    def _answer(self) -> None:
        if self.is_silent.is_set():
            assert self.answers.wait(30)
        if self.num_refusals:
            self.num_refusals -= 1
            raise httpx.ConnectError("away")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(prefect_artifacts, "create_progress_artifact", made.create)
    monkeypatch.setattr(prefect_artifacts, "update_progress_artifact", made.update)
    monkeypatch.setattr(prefect_artifacts, "_SECONDS_BETWEEN_UPDATES", 0.01)
    monkeypatch.setattr(prefect_artifacts, "_SECONDS_TO_END", 0.5)
    return made


def test_a_bar_shows_what_is_newest_and_the_end(server: Server) -> None:
    with progress_bar("training") as move:
        move(0.25)
        _until(lambda: server.shown == [25.0])
        move(1.0)
    assert server.shown == [25.0, 100.0]


@pytest.mark.parametrize("num_refusals", [1, 3])
def test_a_bar_goes_on_when_the_server_is_back(server: Server, num_refusals: int) -> None:
    server.num_refusals = num_refusals
    with progress_bar("training") as move:
        move(0.5)
        _until(lambda: server.shown == [50.0])


def test_a_server_that_says_nothing_holds_up_nobody(server: Server) -> None:
    server.is_silent.set()
    began = time.monotonic()
    with progress_bar("training") as move:
        for step in range(1000):
            move(step / 1000)
    assert time.monotonic() - began < 5
    server.answers.set()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
