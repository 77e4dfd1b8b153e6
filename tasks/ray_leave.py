"""A Ray node that is taken away: ``python -m tasks.ray_leave --root PID``, the preStop hook of its pod.

Told to end, Ray takes no more tasks and waits, for half a minute, for those that it has; then it kills them. So the
worker processes are told too: each training leaves a checkpoint, its task fails, and the flow has it done elsewhere.
"""

import argparse
import contextlib
from pathlib import Path

import psutil


def leave(root: psutil.Process) -> None:
    """Sends SIGTERM to Ray's node, for it to take no more tasks, and to the worker processes, all below ``root``."""
    family = [root, *root.children(recursive=True)]
    for process in (*filter(_is_node, family), *filter(_is_worker, family)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()


def _is_node(process: psutil.Process) -> bool:
    words = _command(process)
    return "start" in words and any(Path(word).name == "ray" for word in words)


def _is_worker(process: psutil.Process) -> bool:
    return "tasks.worker" in _command(process)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def main() -> None:
    """Tells the processes below one that must be named: on a machine, below 1 would be everybody's."""
    parser = argparse.ArgumentParser(description="Have a Ray node leave; trainings leave a checkpoint.")
    parser.add_argument("--root", type=int, required=True, metavar="PID", help="`ray start`, or 1 in a container")
    leave(psutil.Process(parser.parse_args().root))


if __name__ == "__main__":
    main()
