"""Measurements side by side: contestants take turns, so that whatever else the machine does hits all of them."""

import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

T = TypeVar("T")
_PIPED_WIDTH = 140

# Of the recipe digits, where a benchmark shall only show that it runs.
QUICK_OVERRIDES = (
    "dataset.num_images=96",
    "pretrained.training.num_steps=10",
    "finetune.num_steps=4",
    "merge.search.max_candidates=5",
    "merge.search.num_images=8",
    "merge.search.num_reference_images=32",
    "evaluate.num_images=8",
    "evaluate.seeds=[1, 2, 3]",
    "evaluate.num_inference_steps=4",
    "evaluate.extractor_resolution=32",
    "evaluate.kid_subset_size=4",
)


@dataclass(frozen=True)
class Duration:
    """How long one call took.

    Attributes:
        wall_sec: seconds on the clock.
        cpu_sec: seconds of processor time, of all threads of this process and of the processes it started that have
            ended; other programs do not add to it.
    """

    wall_sec: float
    cpu_sec: float


def timed(call: Callable[[], object]) -> Duration:
    """Calls ``call`` once and returns how long it took."""
    wall, cpu = time.perf_counter(), _processor_seconds()
    call()
    return Duration(time.perf_counter() - wall, _processor_seconds() - cpu)


def _processor_seconds() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def take_turns(contestants: Mapping[str, Callable[[], T]], *, num_rounds: int) -> dict[str, list[T]]:
    """Returns what each contestant measured, one entry per round; who begins changes from round to round."""
    measured: dict[str, list[T]] = {name: [] for name in contestants}
    for name in _turns(list(contestants), num_rounds):
        measured[name].append(contestants[name]())
    return measured


def _turns(names: Sequence[str], num_rounds: int) -> Iterator[str]:
    for number in range(num_rounds):
        first = number % len(names)
        yield from (*names[first:], *names[:first])


def median_ratio(ours: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the median over rounds of ours / reference, each pair measured one right after the other."""
    return statistics.median(a / b for a, b in zip(ours, reference, strict=True))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else _PIPED_WIDTH).print(table)


def print_result(name: str, *, ratio: float, goal: float, holds: bool, **details: Any) -> None:
    """Prints the last line of every benchmark: one JSON object.

    Args:
        name: of the benchmark.
        ratio: ours over the reference.
        goal: what the ratio should not exceed.
        holds: whether every goal of the benchmark is met.
        **details: further plain values.
    """
    print(json.dumps({"name": name, "ratio": ratio, "goal": goal, "holds": holds, **details}), flush=True)
