from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tasks import prefect_artifacts
from tasks.prefect_artifacts import progress_artifact


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Where a bar was moved to, by a server that is away in the middle."""
    fractions: list[float] = []

    def update(_: Any, *, progress: float) -> None:
        if progress == 50.0:
            raise httpx.ConnectError("away")
        fractions.append(progress)

    monkeypatch.setattr(prefect_artifacts, "create_progress_artifact", lambda *_, **__: uuid4())
    monkeypatch.setattr(prefect_artifacts, "update_progress_artifact", update)
    monkeypatch.setattr(prefect_artifacts, "_SECONDS_BETWEEN_UPDATES", 0.0)
    return fractions


def test_a_bar_stands_still_while_the_server_is_away(moved: list[float]) -> None:
    move: Callable[[float], None] = progress_artifact("training")
    for fraction in (0.25, 0.5, 1.0):
        move(fraction)
    assert moved == [25.0, 100.0]
