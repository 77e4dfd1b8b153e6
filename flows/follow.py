"""Follows a flow run on a Prefect server to its end."""

import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    WorkerFilter,
    WorkerFilterStatus,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
from prefect.exceptions import ObjectNotFound
from rich.console import Console

from deme_core.errors import DemeError, InputError
from deme_core.settings import Settings
from flows.terminal import say
from tasks.mlflow_client import import_mlflow
from tasks.tracked_runs import find_report

_POLL_SECONDS = 1.0
# Reading the tasks takes a server on SQLite some 30 ms of processor time, three times as long as the run's state.
_POLLS_PER_READING = 3
_SECONDS_UNTIL_TOLD = 15.0
# As many as the server gives at once, and as many as a sentence bears.
_MOST_RUNS, _MOST_NAMED = 200, 5


def follow_run(run: str | None, console: Console) -> dict[str, Any]:
    """Prints each task as it ends, and returns the report once the run has finished.

    Args:
        run: id of a flow run of ``deme``, or its beginning; None for the newest.
        console: where progress goes.

    Raises:
        InputError: there is no such run, or more than one.
        DemeError: the run failed, with the reason; or the server does not answer.
    """
    with get_client(sync_client=True) as client:
        try:
            found = _find(client, run)
            with console.status(f"flow run {found.name} ({str(found.id)[:8]})"):
                state = _wait(client, found, console)
        except httpx.HTTPError as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
                raise  # Said in the same way whatever the command.
            again = "the run may well go on: `deme follow` again"
            raise DemeError(f"Prefect's server {client.api_url} does not answer ({error}); {again}.") from error
    if not state.is_completed():
        raise DemeError(f"Flow run {found.name} is {state.name}: {state.message or 'without a reason'}")
    return find_report(Settings(), flow_run=str(found.id))


def _find(client: SyncPrefectClient, run: str | None) -> FlowRun:
    ours, whole_id = FlowFilter(name=FlowFilterName(any_=["deme"])), _flow_run_id(run)
    newest_first = client.read_flow_runs(
        flow_filter=ours,
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[whole_id])) if whole_id else None,
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=_MOST_RUNS,
    )
    if run:
        chosen = [found for found in newest_first if str(found.id).startswith(str(whole_id or run))]
    else:
        chosen = [found for found in newest_first if not _is_to_come(found)][:1]
    if not chosen:
        which = f"whose id begins with '{run}'" if run else "yet"
        are_more = run and len(newest_first) == _MOST_RUNS
        among = f" among the newest {_MOST_RUNS}; give the whole id of an older one" if are_more else ""
        raise InputError(
            f"There is no run of the flow deme {which} on {client.api_url}{among}; `prefect deployment run deme/full`."
        )
    if len(chosen) > 1:
        named = ", ".join(f"{found.name} ({found.id})" for found in chosen[:_MOST_NAMED])
        more = f" and {len(chosen) - _MOST_NAMED} more" if len(chosen) > _MOST_NAMED else ""
        raise InputError(f"{len(chosen)} runs have an id that begins with '{run}': {named}{more}; give more of it.")
    return chosen[0]


def _flow_run_id(run: str | None) -> UUID | None:
    """Returns the whole id of a flow run; None where ``run`` is its beginning, or no id at all."""
    try:
        return UUID(run) if run else None
    except ValueError:
        return None


def _is_to_come(found: FlowRun) -> bool:
    """Whether a schedule has it start later: what someone follows without naming it was started by somebody."""
    return found.auto_scheduled and found.state is not None and found.state.is_scheduled()


def _wait(client: SyncPrefectClient, found: FlowRun, console: Console) -> State[Any]:
    seen: set[Any] = set()
    queue = _Queue(client, console)
    num_polls = 0
    while True:
        run = client.read_flow_run(found.id)
        state = run.state
        is_final = state is not None and state.is_final()
        if is_final or num_polls % _POLLS_PER_READING == 0:
            _print_ended(client, found, console, seen)
            queue.look(run)
        if state is not None and is_final:
            return state
        if seen:
            import_mlflow()  # For the report: now nobody waits for it.
        num_polls += 1
        time.sleep(_POLL_SECONDS)


class _Queue:
    """Tells why a run that has not started for a while does not, once for each reason."""

    def __init__(self, client: SyncPrefectClient, console: Console) -> None:
        self._client, self._console = client, console
        self._type: StateType | None = None
        self._since = 0.0
        self._told = ""

    def look(self, run: FlowRun) -> None:
        """Looks at the run as it is now."""
        state = run.state
        if state is None or not (state.is_scheduled() or state.is_pending()):
            self._type = None
            return
        if state.type != self._type:
            self._type, self._since = state.type, time.monotonic()
        if time.monotonic() - self._since < _SECONDS_UNTIL_TOLD:
            return
        reason = self._reason(run.work_pool_name, state)
        if reason != self._told:
            self._told = reason
            say(self._console, f"waits: {reason}")

    def _reason(self, pool: str | None, state: State[Any]) -> str:
        begin = state.state_details.scheduled_time
        if state.is_scheduled() and begin is not None and begin > datetime.now(UTC):
            return f"{state.name} for {_clock(begin)}"
        problem = self._problem_of_pool(pool) if pool else None
        return problem or f"{state.name} since {_clock(state.timestamp)}"

    def _problem_of_pool(self, name: str) -> str | None:
        online = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))
        try:
            pool = self._client.read_work_pool(name)
            if pool.is_paused:
                return f"work pool {name} is paused"
            if not self._client.read_workers_for_work_pool(name, worker_filter=online):
                return f"no worker of work pool {name} is online"
        except ObjectNotFound:
            return f"work pool {name} is gone"
        return None


def _clock(when: datetime) -> str:
    """Returns a time as clocks here show it, with the date if that is another."""
    here, now = when.astimezone(), datetime.now().astimezone()
    return f"{here:%H:%M}" if here.date() == now.date() else f"{here:%Y-%m-%d %H:%M}"


def _print_ended(client: SyncPrefectClient, found: FlowRun, console: Console, seen: set[Any]) -> None:
    only_it = FlowRunFilter(id=FlowRunFilterId(any_=[found.id]))
    # The server gives 200 at most, and a search may have more tasks: those that ended last.
    newest = client.read_task_runs(flow_run_filter=only_it, sort=TaskRunSort.END_TIME_DESC, limit=200)
    for task in reversed(newest):
        if task.id not in seen and task.state is not None and task.state.is_final():
            seen.add(task.id)
            say(console, _line(task))


def _line(task: TaskRun) -> str:
    ended = f"{task.total_run_time.total_seconds():.1f} s" if task.state and task.state.is_completed() else "failed"
    return f"{task.name}: {ended}"
