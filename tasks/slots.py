"""The places that a machine has for worker processes: its GPUs, or shares of its cores."""

import os
import shutil
import subprocess
from dataclasses import dataclass

from deme_core.errors import InputError
from deme_core.recipe import ExecutionSpec


@dataclass(frozen=True)
class Slot:
    """A place for one worker process.

    Attributes:
        device: cpu or cuda.
        gpu: the GPU that the process sees, or several, by commas; None on CPU.
        num_threads: threads torch may use.
    """

    device: str
    gpu: str | None
    num_threads: int


def count_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # Not on macOS.


def plan_slots(execution: ExecutionSpec, *num_processes: int) -> list[Slot]:
    """Returns the slots of this machine: one per GPU, or ``num_workers`` on CPU that share its cores.

    Args:
        execution: how many, and where.
        num_processes: processes of data-parallel trainings. There are slots with so many GPUs, too, of the same GPUs:
            what runs in one keeps the others from theirs.

    Raises:
        InputError: CUDA is asked for on a machine that shows no GPU, or too few for one training.
    """
    num_cores = count_cores()
    gpus = visible_gpus() if execution.device != "cpu" else []
    if execution.device == "cuda" and not gpus:
        raise InputError(
            "execution.device is cuda, but this machine shows no GPU; run on one that does, let execution.runner "
            "prefect or ray find one, or set execution.device to auto or cpu."
        )
    if not gpus:
        num_workers = execution.num_workers or 1
        return [Slot("cpu", None, max(num_cores // num_workers, 1)) for _ in range(num_workers)]
    if len(gpus) < (most := max(num_processes, default=1)):
        raise InputError(f"num_processes is {most}, but this machine shows {len(gpus)} GPUs; lower it.")
    slots = []
    for size in sorted({1, *num_processes}):
        groups = [gpus[low : low + size] for low in range(0, len(gpus) - size + 1, size)][: execution.num_workers]
        slots += [Slot("cuda", ",".join(group), max(num_cores // len(groups), 1)) for group in groups]
    return slots


def visible_gpus() -> list[str]:
    """Returns the GPUs this process may use, without importing torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return listed.stdout.split() if listed.returncode == 0 else []
