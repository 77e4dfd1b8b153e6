"""What does the platform add to a segment: Prefect, MLflow, the object store, the way to a worker process and back?

The product's own flow runtime and task finetune N segments, on the local runner, whose training is no work
(benchmarks/no_work). The time from the first submission to the last result, over N, is what a segment is charged.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.measurement import print_result, print_table
from benchmarks.s3_server import s3_server

GOAL_SEC, GOAL_GROWTH = 1.0, 1.25
_NO_WORK = Path(__file__).with_name("no_work")


@dataclass(frozen=True)
class Run:
    """One flow run of N segments.

    Attributes:
        num_segments: N.
        wall_sec: from the first submission to the last result.
        flow_sec: of the whole flow, its start and end included.
        cpu_sec: of this process: Prefect's client, MLflow; no worker, no server.
        worker_sec: of the worker, segment after segment, with its store.
        store_sec: the part of it spent on object store and cache.
        mlflow_sec: spent in calls of MLflow, by all threads.
    """

    num_segments: int
    wall_sec: float
    flow_sec: float
    cpu_sec: float
    worker_sec: float
    store_sec: float
    mlflow_sec: float

    @property
    def per_segment(self) -> float:
        """Seconds that a segment is charged."""
        return self.wall_sec / self.num_segments


class Stopwatch:
    """Adds up the time that calls of a class's methods take, in whatever thread; calls inside of calls count once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside, self._lock = threading.local(), threading.Lock()

    def watch(self, owner: type, names: Sequence[str]) -> None:
        """Replaces the methods by ones that are watched."""
        for name in names:
            setattr(owner, name, self._watched(name, getattr(owner, name)))

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "yes", False):
                return method(*args, **kwargs)
            self._inside.yes, started = True, time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._inside.yes = False
                with self._lock:
                    self.seconds[name] += time.perf_counter() - started

        return call

    def total(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())


def run_segments(num_segments: int, seed: int, stopwatch: Stopwatch) -> Run:
    """Runs a flow of ``num_segments`` segments that no run had before."""
    from prefect import flow
    from prefect.task_runners import ThreadPoolTaskRunner

    from deme_core.manifest import ArtifactRef
    from deme_core.recipe_file import load_recipe
    from flows.flow_runtime import flow_runtime
    from tasks.jobs import FinetuneJob
    from tasks.runtime import current_runtime
    from tasks.stages import finetune

    overrides = (f"segments={{count: {num_segments}}}", f"finetune.seed={seed}", "merge={method: average}")
    recipe = load_recipe("digits", overrides)
    uri = "file:///nowhere/pretrained/" + "0" * 64
    jobs = [
        FinetuneJob(
            label=f"segment {index}",
            pretrained=ArtifactRef(uri, "0" * 64),
            dataset=recipe.dataset,
            finetune=recipe.finetune,
            low=index,
            high=index + 1,
            num_steps=num_segments,
        )
        for index in range(num_segments)
    ]

    @flow(name="overhead", task_runner=ThreadPoolTaskRunner(max_workers=64))
    def overhead() -> Run:
        with flow_runtime(recipe):
            # The worker's imports are paid once a run, whatever N is.
            current_runtime().do(jobs[0].model_copy(update={"num_steps": 10**6 + seed}))
            stopwatch.seconds.clear()
            began, cpu_before = time.perf_counter(), time.process_time()
            futures = [finetune.submit(job, f"finetune/segment-{i}") for i, job in enumerate(jobs)]
            results = [future.result() for future in futures]
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu_before
            assert not any(result.cached for result in results)
            worker, store = (sum(getattr(r, n) for r in results) for n in ("seconds", "storage_seconds"))
            return Run(num_segments, wall, 0.0, cpu, worker, store, stopwatch.total())

    started = time.perf_counter()
    run = overhead()
    return Run(**{**vars(run), "flow_sec": time.perf_counter() - started})


def report(runs: Mapping[int, Sequence[Run]], title: str) -> None:
    """Prints the table and the result; ``ratio`` is the worst seconds per segment over the one that is allowed."""
    rows, per_segment = [], {}
    for count, found in runs.items():

        def middle(name: str, found: Sequence[Run] = found) -> float:
            return statistics.median(getattr(run, name) for run in found) / found[0].num_segments

        per_segment[count] = middle("wall_sec")
        parts = [middle(name) for name in ("cpu_sec", "mlflow_sec", "worker_sec", "store_sec")]
        outside = statistics.median(run.flow_sec - run.wall_sec for run in found)
        rows.append((str(count), f"{per_segment[count]:.3f}", *(f"{part:.3f}" for part in parts), f"{outside:.1f}"))
    columns = ("N", "s per segment", "processor s here", "in MLflow", "in worker", "of it store", "s before and after")
    print_table(title, columns, rows)
    counts = sorted(per_segment)
    growth = per_segment[counts[-1]] / per_segment[counts[-2]] if len(counts) > 1 else 1.0
    worst = max(per_segment.values())
    print_result(
        "overhead",
        ratio=worst / GOAL_SEC,
        goal=1.0,
        holds=worst <= GOAL_SEC and growth <= GOAL_GROWTH,
        seconds_per_segment=per_segment,
        growth=growth,
        growth_goal=GOAL_GROWTH,
    )


@contextmanager
def _environment(*, s3: bool) -> Iterator[None]:
    """A DEME_HOME of its own, and on request an S3 server for the store; nothing of the user's."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "DEME_", "MLFLOW_", "PREFECT_"))]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="deme-overhead-", ignore_cleanup_errors=True) as home:
        os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
        os.environ |= {"DEME_HOME": home, "PYTHONPATH": f"{_NO_WORK}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        (Path(home) / "server").mkdir()
        with s3_server(Path(home) / "server") if s3 else nullcontext({}) as variables:
            os.environ |= variables | ({"DEME_STORE_URI": "s3://deme/store"} if s3 else {})
            from flows.environment import set_defaults

            set_defaults()
            yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs flows, prints a table and the result."""
    options = _options(arguments)
    with _environment(s3=options.store == "s3"):
        import logging

        from tasks.tracking import Tracker

        stopwatch = Stopwatch()
        methods = ("child", "log_params", "log_training", "log_text", "set_tags", "finish")
        stopwatch.watch(Tracker, methods)
        logging.getLogger("prefect").setLevel(logging.WARNING)
        run_segments(1, 0, stopwatch)  # Starts Prefect's temporary server, and imports MLflow.
        runs: dict[int, list[Run]] = {count: [] for count in options.counts}
        for number in range(options.rounds):
            for count in options.counts:
                runs[count].append(run_segments(count, 1 + number, stopwatch))
    title = f"N segments without work: Prefect's temporary server, MLflow on SQLite, store {options.store}, "
    report(runs, f"{title}one worker, medians of {options.rounds} rounds")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="N = 2 and 4, once: shows that it runs")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of segments (default 2 8 32)")
    parser.add_argument("--rounds", type=int, help="flow runs of each (default 3, quick 1)")
    parser.add_argument("--store", choices=["s3", "file"], default="s3", help="SeaweedFS on loopback, or a folder")
    options = parser.parse_args(arguments)
    options.counts = options.counts or ([2, 4] if options.quick else [2, 8, 32])
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


if __name__ == "__main__":
    main()
