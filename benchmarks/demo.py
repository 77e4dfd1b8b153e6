"""Where does the time of `make demo` go, and how much of it is not work?

The commands of `make demo` run one after another in a temporary DEME_HOME. Work is the time in which at least one job
runs, storage excepted; all else is what the platform costs. Wall times want a machine that does nothing else; the
processor seconds beside them hardly notice other programs.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import psutil

from benchmarks.measurement import print_result, print_table
from flows.stack.processes import find_started_by

_GOAL, _GOAL_SECONDS, _GOAL_GB = 0.10, 300.0, 4.0
_SECONDS_BETWEEN_SAMPLES = 10.0
_FOREIGN = ("AWS_", "DEME_", "MLFLOW_", "PREFECT_")
_QUICK = (
    "dataset.num_images=96",
    "pretrained.training.num_steps=10",
    "finetune.num_steps=3",
    "merge.search.max_candidates=5",
    "merge.search.num_images=8",
    "merge.search.num_reference_images=32",
    "evaluate.num_images=8",
    "evaluate.seeds=[1, 2, 3]",
    "evaluate.num_inference_steps=2",
    "evaluate.extractor_resolution=32",
    "evaluate.kid_subset_size=4",
)


@dataclass(frozen=True)
class Moment:
    """A point in time.

    Attributes:
        epoch: seconds since the epoch.
        cpu_sec: processor time until then, of the stack and of all commands that have ended.
    """

    epoch: float
    cpu_sec: float


@dataclass
class Demo:
    """`make demo`, command by command, in a state folder of its own."""

    home: Path
    moments: dict[str, Moment] = field(default_factory=dict)

    def run(self, overrides: Sequence[str]) -> dict[str, Any]:
        """Runs the demo to its end and returns the report; ``moments`` then has the end of each command."""
        self._note("begin")
        self._call("deme", "up")
        self._note("up")
        variables = dict(line.removeprefix("export ").split("=", 1) for line in self._call("deme", "env").splitlines())
        shell = {name: value.strip("'") for name, value in variables.items()}
        parameters = ["--param", f"overrides={json.dumps(list(overrides))}"] if overrides else []
        self._call("prefect", "deployment", "run", "deme/full", *parameters, shell=shell)
        self._note("submitted")
        report: dict[str, Any] = json.loads(self._call("deme", "follow", "--json", shell=shell).splitlines()[-1])
        self._note("followed")
        self._call("deme", "status", shell=shell)
        self._note("end")
        report["flow_started"], report["first_task_started"] = _when_it_began(shell, report["flow_run_id"])
        return report

    def _call(self, *command: str, shell: Mapping[str, str] | None = None) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        environment = kept | {"DEME_HOME": str(self.home)} | dict(shell or {})
        binary = Path(sys.executable).parent / command[0]
        return subprocess.run(
            [binary, *command[1:]], env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    def _note(self, name: str) -> None:
        commands = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = commands.ru_utime + commands.ru_stime + sum(map(_cpu_seconds, find_started_by(str(self.home))))
        self.moments[name] = Moment(time.time(), spent)

    def stop(self) -> None:
        """Stops the stack."""
        self._call("deme", "down")


def _cpu_seconds(process: psutil.Process) -> float:
    """Returns the processor time of a process and of those of its children that have ended."""
    try:
        return sum(process.cpu_times()[:4])
    except psutil.Error:
        return 0.0


def _when_it_began(shell: Mapping[str, str], flow_run: str) -> tuple[float, float]:
    """Returns when the flow run, and its first task, began: seconds since the epoch."""
    with httpx.Client(base_url=shell["PREFECT_API_URL"], timeout=30) as client:
        run = client.get(f"flow_runs/{flow_run}").raise_for_status().json()
        only_it = {"flow_runs": {"id": {"any_": [flow_run]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 1}
        first = client.post("task_runs/filter", json=only_it).raise_for_status().json()[0]
    return tuple(datetime.fromisoformat(each["start_time"]).timestamp() for each in (run, first))  # type: ignore[return-value]


def split(moments: Mapping[str, Moment], report: Mapping[str, Any]) -> dict[str, float]:
    """Returns the seconds of each part of the demo, which add up to its total.

    Args:
        moments: when each command ended.
        report: of the run, with ``flow_started`` and ``first_task_started``; its ``seconds`` begin with the flow.
    """
    seconds, began = report["seconds"], report["flow_started"]
    idle_before = report["first_task_started"] - began
    return {
        "stack": moments["up"].epoch - moments["begin"].epoch,
        "until_first_job": report["first_task_started"] - moments["up"].epoch,
        "work": seconds["total"] - seconds["idle"] - seconds["storage"],
        "idle": seconds["idle"] - idle_before,
        "storage": seconds["storage"],
        "end": moments["end"].epoch - began - seconds["total"],
    }


class PeakMemory:
    """Samples, now and then, the proportional set size of this process's children and of all of a stack."""

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


@contextmanager
def _demo_in(folder: Path) -> Iterator[Demo]:
    demo = Demo(folder / "home")
    try:
        yield demo
    finally:
        demo.stop()


_NAMES = {
    "stack": "`deme up`",
    "until_first_job": "until the first task: `deme env`, `prefect deployment run`, the worker's poll, imports",
    "work": "work: at least one job runs",
    "idle": "no job runs, later in the flow",
    "storage": "storage, inside of jobs",
    "end": "the report's last calls, `deme follow`, `deme status`",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its tables and its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models and few images: shows that it runs")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="override a setting of the recipe")
    options = parser.parse_args(arguments)
    overrides = [*(_QUICK if options.quick else ()), *options.overrides]
    with (
        tempfile.TemporaryDirectory(prefix="deme-demo-") as folder,
        _demo_in(Path(folder)) as demo,
        PeakMemory(demo.home) as memory,
    ):
        report = demo.run(overrides)
    print_demo(demo.moments, report, memory.peak_bytes / 1e9)


def print_demo(moments: Mapping[str, Moment], report: Mapping[str, Any], peak_gb: float) -> None:
    """Prints the tables and the result."""
    parts = split(moments, report)
    total = sum(parts.values())
    rows = [(_NAMES[name], f"{sec:.1f}", f"{sec / total:.1%}") for name, sec in [*parts.items()]]
    print_table("make demo", ("part", "seconds", "share"), [*rows, ("all", f"{total:.1f}", "")])
    names = list(moments)
    cpu = {after: moments[after].cpu_sec - moments[before].cpu_sec for before, after in itertools.pairwise(names)}
    print_table("processor seconds, until …", ("", "seconds"), [(name, f"{sec:.1f}") for name, sec in cpu.items()])
    ratio = 1.0 - parts["work"] / total
    print_result(
        "demo",
        ratio=ratio,
        goal=_GOAL,
        holds=ratio <= _GOAL and total <= _GOAL_SECONDS and peak_gb <= _GOAL_GB,
        seconds=parts | {"total": total},
        cpu_seconds=cpu,
        peak_pss_gb=peak_gb,
        stages=report["seconds"],
    )


if __name__ == "__main__":
    main()
