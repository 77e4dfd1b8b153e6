"""Live progress in the terminal: a bar per task where there is a terminal, otherwise a line when one ends."""

import threading
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flows.terminal import printable, say
from tasks.progress import Event, subscribe


class ProgressDisplay:
    """Shows what the tasks of this process do, while it is entered."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<36}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Starts listening."""
        self._unsubscribe = subscribe(self._show)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops listening."""
        self._progress.stop()
        self._unsubscribe()

    def _show(self, event: Event) -> None:
        with self._lock:
            if event.task not in self._bars:
                self._bars[event.task] = self._progress.add_task(printable(event.task), total=None, note="")
            bar = self._bars[event.task]
            if event.kind == "progress":
                self._progress.update(bar, **_position(event.record))
                if event.record.get("is_waiting"):
                    self._say(f"{event.task}: {event.record['message']}")
            elif event.kind == "warning":
                say(self._console, f"{event.task}: {event.record['message']}")
            elif event.kind in ("finished", "cached"):
                note = "from the store" if event.kind == "cached" else f"{event.record['seconds']:.1f} s"
                total = self._progress.tasks[bar].total or 1
                self._progress.update(bar, total=total, completed=total, note=note)
                self._progress.stop_task(bar)
                self._say(f"{event.task}: {note}")
            elif event.kind in ("failed", "stopped"):
                self._progress.stop_task(bar)
                self._progress.update(bar, note=event.kind)
                self._say(f"{event.task}: {event.kind}")

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            say(self._console, line)


def _position(record: dict[str, Any]) -> dict[str, Any]:
    """Returns what a progress record says, as arguments of ``Progress.update``."""
    if "global_step" in record:
        note = f"loss {record['loss']:.4f}, {record['images_per_sec']:.0f} images/s"
        return {"completed": record["global_step"], "total": record["num_steps"], "note": note}
    if "best_score" in record:
        return {"completed": record["done"], "total": record["total"], "note": f"best {record['best_score']:.4g}"}
    if "done" in record:
        return {"completed": record["done"], "total": record["total"]}
    return {"note": record.get("message", "")}
