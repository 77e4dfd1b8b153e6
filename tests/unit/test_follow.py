"""Which run `deme follow` follows, and what it says of one that does not start."""

from datetime import UTC, datetime, timedelta
from io import StringIO
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Late, Pending, Running, Scheduled, State
from rich.console import Console

from deme_core.errors import InputError
from flows import follow
from flows.follow import _find, _Queue


def flow_run(name: str, *, scheduled: bool, auto_scheduled: bool) -> Any:
    state = SimpleNamespace(is_scheduled=lambda: scheduled)
    return SimpleNamespace(id=name, state=state, auto_scheduled=auto_scheduled)


def test_a_run_that_a_schedule_has_in_store_is_followed_only_by_its_name() -> None:
    tonight = flow_run("tonight", scheduled=True, auto_scheduled=True)
    mine = flow_run("mine", scheduled=True, auto_scheduled=False)
    last_night = flow_run("last night", scheduled=False, auto_scheduled=True)

    def found(*runs: Any, name: str | None = None) -> Any:
        client: Any = SimpleNamespace(read_flow_runs=lambda **_: list(runs), api_url="here")
        return _find(client, name)

    assert found(tonight, mine, last_night) is mine
    assert found(tonight, last_night) is last_night
    assert found(tonight, mine, name="ton") is tonight
    with pytest.raises(InputError, match="There is no run of the flow deme yet"):
        found(tonight)


class Runs:
    """A server with flow runs, newest first; it gives 200 at most, as the real one does."""

    api_url = "here"

    def __init__(self, *ids: str) -> None:
        self._runs = [SimpleNamespace(id=UUID(each), name=f"run {index}") for index, each in enumerate(ids)]

    def read_flow_runs(self, *, flow_run_filter: Any, limit: int, **_: Any) -> list[Any]:
        wanted = flow_run_filter.id.any_ if flow_run_filter else [run.id for run in self._runs]
        return [run for run in self._runs if run.id in wanted][: min(limit, 200)]

    def find(self, run: str) -> str:
        server: Any = self
        return _find(server, run).name


def test_several_runs_whose_ids_begin_alike_are_named() -> None:
    runs = Runs("ab" + "0" * 30, "cd" + "0" * 30, "ab" + "1" * 30)
    assert runs.find("cd") == "run 1"
    assert runs.find("ab1") == "run 2"
    with pytest.raises(InputError) as caught:
        runs.find("ab")
    assert str(caught.value) == (
        "2 runs have an id that begins with 'ab': run 0 (ab000000-0000-0000-0000-000000000000), "
        "run 2 (ab111111-1111-1111-1111-111111111111); give more of it."
    )
    many = Runs(*(f"ab{index:030x}" for index in range(7)))
    with pytest.raises(InputError, match=r"^7 runs .* run 4 \(ab[-0]*4\) and 2 more; give more of it\.$"):
        many.find("ab")


def test_a_run_beyond_the_newest_is_found_by_its_whole_id() -> None:
    runs = Runs(*(f"{index:032x}" for index in range(250)))
    oldest = str(UUID(int=249))
    assert runs.find(oldest) == runs.find(oldest.upper()) == "run 249"
    with pytest.raises(InputError, match="among the newest 200; give the whole id of an older one; `prefect"):
        runs.find(oldest[:-1])
    with pytest.raises(InputError, match="begins with 'ffffffff-ffff-4fff-8fff-ffffffffffff' on here; `prefect"):
        runs.find("ffffffff-ffff-4fff-8fff-ffffffffffff")


class Pool:
    """A server with one work pool, a run that waits there, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_paused, self.is_there, self.workers = False, True, ["worker"]
        self._seconds = 0.0
        self._console = Console(file=StringIO(), width=200)
        client: Any = SimpleNamespace(
            read_work_pool=self._read, read_workers_for_work_pool=lambda _name, worker_filter: self.workers
        )
        self._queue = _Queue(client, self._console)
        monkeypatch.setattr(follow.time, "monotonic", lambda: self._seconds)

    def _read(self, name: str) -> Any:
        assert name == "deme-cpu"
        if not self.is_there:
            raise ObjectNotFound(Exception("gone"))
        return self

    def lines(self, state: State[Any], *, seconds: int) -> list[str]:
        """What is said while the run is in a state."""
        before = len(self._console.file.getvalue())  # type: ignore[attr-defined]
        for _ in range(seconds):
            run: Any = SimpleNamespace(state=state, work_pool_name="deme-cpu")
            self._queue.look(run)
            self._seconds += 1.0
        return str(self._console.file.getvalue())[before:].splitlines()  # type: ignore[attr-defined]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    return Pool(monkeypatch)


def test_what_a_run_waits_for_is_said_once_it_has_waited_for_a_while(pool: Pool) -> None:
    pool.workers = []
    assert pool.lines(Scheduled(), seconds=14) == []
    assert pool.lines(Late(), seconds=30) == ["waits: no worker of work pool deme-cpu is online"]
    pool.is_paused = True
    assert pool.lines(Late(), seconds=30) == ["waits: work pool deme-cpu is paused"]
    pool.is_there = False
    assert pool.lines(Late(), seconds=30) == ["waits: work pool deme-cpu is gone"]


def test_a_run_that_a_worker_has_taken_is_given_time_of_its_own(pool: Pool) -> None:
    noon = datetime.now().astimezone().replace(hour=12, minute=3)
    pending = State(type=StateType.PENDING, name="Submitting", timestamp=noon.astimezone(UTC))
    pool.workers = []
    assert pool.lines(Scheduled(), seconds=20) == ["waits: no worker of work pool deme-cpu is online"]
    pool.workers = ["worker"]
    assert pool.lines(pending, seconds=14) == []
    assert pool.lines(pending, seconds=30) == ["waits: Submitting since 12:03"]


def test_of_a_run_that_starts_in_time_nothing_is_said(pool: Pool) -> None:
    pool.workers = []
    for state in (Scheduled(), Pending()):
        assert pool.lines(state, seconds=10) == []
    assert pool.lines(Running(), seconds=60) == []


def test_of_a_run_that_is_to_start_later_it_is_said_when(pool: Pool) -> None:
    later = (datetime.now().astimezone() + timedelta(days=2)).replace(hour=3, minute=0)
    pool.workers = []
    told = pool.lines(Scheduled(scheduled_time=later.astimezone(UTC)), seconds=30)
    assert told == [f"waits: Scheduled for {later:%Y-%m-%d} 03:00"]
