"""The places that a machine has for worker processes: its GPUs, or shares of its cores."""

import functools
import itertools
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deme_core.errors import InputError
from deme_core.recipe import ExecutionSpec

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_NAME_OF_A_GPU = re.compile(r"\d+|(GPU|MIG)-.+")


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
    """Returns how many cores this process may use: those it is bound to, or the time of fewer, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # Not on macOS.
    return max(math.ceil(min(cores, *_quotas())), 1)


def _quotas() -> Iterator[float]:
    """Gives how many cores' time control groups allow: a CPU limit of Kubernetes, cpus of Compose. At least one."""
    yield math.inf
    for folder in _control_groups():
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()  # "max" is no number.
            yield int(quota) / int(period)
        with suppress(OSError, ValueError):
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:  # -1 is no limit.
                yield int(quota) / int(period)


def _control_groups() -> Iterator[Path]:
    """Gives the folders of the groups whose limits this process has, its own and all above it.

    In a container they are where the host's paths would not lead: at the top.
    """
    with suppress(OSError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            # Version 2 has one tree, and lists no controllers.
            top = _CONTROL_GROUPS / "cpu" if controllers else _CONTROL_GROUPS
            parts = Path(path).parts[1:]
            yield from (top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


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
        # As CUDA reads it: what names no GPU ends the list, be it nothing, -1, or Slurm's NoDevFiles.
        return list(itertools.takewhile(_NAME_OF_A_GPU.fullmatch, map(str.strip, visible.split(","))))
    return [number for number, _, _ in _listed_gpus()]


def card_names(gpus: Iterable[str]) -> list[str]:
    """Returns names of GPUs that all processes of this machine share, whichever they see, and as what.

    Slurm and Docker show a process its GPU as number 0, and another process another one as 0; so these are UUIDs. MIG
    instances keep their names, and GPUs their numbers where it is not known which of them CUDA counts so.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES has them.
    """
    listed = _listed_gpus()
    # By itself CUDA counts from the fastest one, nvidia-smi along the bus: of one model they count alike.
    is_known = len({model for _, _, model in listed}) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    uuids = {number: uuid for number, uuid, _ in listed if is_known and uuid.startswith("GPU-")}
    return [uuids.get(gpu) or _whole(gpu, [uuid for _, uuid, _ in listed]) for gpu in gpus]


def _whole(gpu: str, uuids: list[str]) -> str:
    """Returns the UUID that ``gpu`` begins, as CUDA lets it be abbreviated; else ``gpu`` itself."""
    found = [uuid for uuid in uuids if gpu.startswith("GPU-") and uuid.startswith(gpu)]
    return found[0] if len(found) == 1 else gpu


@functools.cache
def _listed_gpus() -> tuple[tuple[str, str, str], ...]:
    """Returns number, UUID and model of each GPU that the driver shows this process.

    nvidia-smi heeds control groups, as CUDA does, and makes no CUDA context, which torch would in this process.
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [(*line.split(", ", 2), "", "")[:3] for line in listed.stdout.splitlines() if listed.returncode == 0]
    return tuple((number, uuid, model) for number, uuid, model in rows if number.isdigit())
