"""Where does the time of `make demo` go, and how much of it is not work?

The commands of `make demo` run one after another in a temporary DEME_HOME. Work is the time in which at least one job
runs, without what jobs spend on the object store; all else is what the platform costs. Seconds on the clock want a
machine that does nothing else; the processor seconds beside them notice other programs less.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import psutil

from benchmarks.measurement import QUICK_OVERRIDES, print_result, print_table
from flows.stack.processes import find_started_by

UP, ENV, RUN, FOLLOW = COMMANDS = (
    "deme up",
    "deme env",
    "prefect deployment run deme/full",
    "deme follow",
)
PARTS = {
    "stack": f"{UP}: everything is ready",
    "until_first_task": f"{ENV}, {RUN}, the worker's poll, imports",
    "work": "work: at least one job runs",
    "idle": "later in the flow, no job runs",
    "storage": "object store, inside of jobs",
    "end": f"the rest of {FOLLOW}",
}
_GOAL, _GOAL_SECONDS, _GOAL_GB = 0.10, 300.0, 4.0
_SECONDS_BETWEEN_SAMPLES = 10.0
_FOREIGN = ("AWS_", "DEME_", "MLFLOW_", "PREFECT_")


@dataclass(frozen=True)
class Moment:
    """The end of a command.

    Attributes:
        epoch: seconds since the epoch.
        cpu_sec: processor time until then, of the stack and of all commands that have ended.
    """

    epoch: float
    cpu_sec: float


@dataclass
class Demo:
    """`make demo`, command by command, in a state folder of its own.

    Attributes:
        home: DEME_HOME.
        moments: when it began, as ``begin``, and when each command ended.
        report: of the run, once it has finished.
        flow_began: when the flow run began (epoch seconds).
        first_task_began: when its first task did.
    """

    home: Path
    moments: dict[str, Moment] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    flow_began: float = 0.0
    first_task_began: float = 0.0

    def run(self, overrides: Sequence[str]) -> None:
        """Runs the demo to its end, and stops its stack in any case."""
        try:
            self._note("begin")
            self._call(UP)
            lines = [line.removeprefix("export ") for line in self._call(ENV).splitlines()]
            shell = {name: value.strip("'") for name, _, value in (line.partition("=") for line in lines)}
            self._call(RUN, "--param", f"overrides={json.dumps(list(overrides))}", shell=shell)
            self.report = json.loads(self._call(FOLLOW, "--json", shell=shell).splitlines()[-1])
            self.flow_began, self.first_task_began = ask_when_it_began(self.report["flow_run_id"], shell)
        finally:
            self._call("deme down")

    def _call(self, command: str, *options: str, shell: Mapping[str, str] | None = None) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        program, *arguments = command.split()
        done = subprocess.run(
            [Path(sys.executable).parent / program, *arguments, *options],
            env=kept | {"DEME_HOME": str(self.home)} | dict(shell or {}),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        self._note(command)
        return done.stdout

    def _note(self, name: str) -> None:
        commands = resource.getrusage(resource.RUSAGE_CHILDREN)
        services = sum(map(_cpu_seconds, find_started_by(str(self.home))))
        self.moments[name] = Moment(time.time(), commands.ru_utime + commands.ru_stime + services)


def ask_when_it_began(flow_run_id: str, shell: Mapping[str, str]) -> tuple[float, float]:
    """Asks a stack's Prefect server when a flow run began, and when its first task did.

    Args:
        flow_run_id: of the flow run.
        shell: what `deme env` says, which names the server and its login.

    Returns:
        Both in seconds since the epoch.
    """
    api, login = shell["PREFECT_API_URL"], httpx.BasicAuth(*shell["PREFECT_API_AUTH_STRING"].split(":", 1))
    first = {"flow_runs": {"id": {"any_": [flow_run_id]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 1}
    with httpx.Client(timeout=30, auth=login, trust_env=False) as client:  # No proxy leads to loopback.
        run = client.get(f"{api}/flow_runs/{flow_run_id}").raise_for_status().json()
        task = client.post(f"{api}/task_runs/filter", json=first).raise_for_status().json()[0]
    began, task_began = (datetime.fromisoformat(each["start_time"]).timestamp() for each in (run, task))
    return began, task_began


def _cpu_seconds(process: psutil.Process) -> float:
    """Returns the processor time of a process and of those of its children that have ended."""
    try:
        return sum(process.cpu_times()[:4])
    except psutil.Error:
        return 0.0


def split(demo: Demo) -> dict[str, float]:
    """Returns the seconds of each part of the demo; they add up to all of it."""
    at = {name: moment.epoch for name, moment in demo.moments.items()}
    in_flow = demo.report["seconds"]  # Its clock starts with the flow, and stops when the report is written.
    return {
        "stack": at[UP] - at["begin"],
        "until_first_task": demo.first_task_began - at[UP],
        "work": in_flow["total"] - in_flow["idle"] - in_flow["storage"],
        "idle": in_flow["idle"] - (demo.first_task_began - demo.flow_began),
        "storage": in_flow["storage"],
        "end": at[FOLLOW] - demo.flow_began - in_flow["total"],
    }


class PeakMemory:
    """Samples, now and then, the proportional set size of this process's children and of a stack."""

    def __init__(self, home: Path) -> None:
        self.peak_bytes = 0
        self._home, self._stop = home, Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_SAMPLES):
            family = {*psutil.Process().children(recursive=True), *find_started_by(str(self._home))}
            self.peak_bytes = max(self.peak_bytes, sum(_pss_bytes(process.pid) for process in family))


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # It has ended.
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def print_demo(demo: Demo, peak_gb: float) -> None:
    """Prints the tables and the result."""
    parts = split(demo)
    total = sum(parts.values())
    rows = [(PARTS[name], f"{seconds:.1f}", f"{seconds / total:.1%}") for name, seconds in parts.items()]
    print_table("make demo", ("part", "seconds", "share"), [*rows, ("all of it", f"{total:.1f}", "")])
    before = dict(zip(COMMANDS, ["begin", *COMMANDS], strict=False))
    cpu = {name: demo.moments[name].cpu_sec - demo.moments[before[name]].cpu_sec for name in COMMANDS}
    print_table("processor seconds", ("until the end of", "seconds"), [(k, f"{v:.1f}") for k, v in cpu.items()])
    ratio = 1.0 - parts["work"] / total
    print_result(
        "demo",
        ratio=ratio,
        goal=_GOAL,
        holds=ratio <= _GOAL and total <= _GOAL_SECONDS and peak_gb <= _GOAL_GB,
        seconds={**parts, "total": total},
        cpu_seconds=cpu,
        peak_pss_gb=peak_gb,
        stages=demo.report["seconds"],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its tables and its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models and few images: shows that it runs")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="override a setting of the recipe")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="deme-demo-") as folder:
        demo = Demo(Path(folder) / "home")
        with PeakMemory(demo.home) as memory:
            demo.run([*(QUICK_OVERRIDES if options.quick else ()), *options.overrides])
    print_demo(demo, memory.peak_bytes / 1e9)


if __name__ == "__main__":
    main()
