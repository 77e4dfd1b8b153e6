"""`kill -9` of the workers of a `deme run`, and of the run itself, without any server: the next run finishes it."""

import os
import signal
from pathlib import Path
from typing import Any

from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import WriteRecipe, deme, first_report, fresh_deme, prefect_api, write_recipe
from tests.e2e.waiting import wait_for

__all__ = ["deme", "first_report", "fresh_deme", "prefect_api", "write_recipe"]


def test_killed_worker_and_killed_run_end_with_the_same_model(
    fresh_deme: CommandLine, write_recipe: WriteRecipe, first_report: dict[str, Any]
) -> None:
    run = fresh_deme.start("run", write_recipe())
    try:
        wait_for(lambda: any(fresh_deme.home.glob("store/checkpoints/*/step-*/manifest.json")))
        killed = set(_workers_of(run.pid))
        assert killed
        for worker in killed:
            os.kill(worker, signal.SIGKILL)
        wait_for(lambda: set(_workers_of(run.pid)) - killed)  # The retries have new processes.
        wait_for(lambda: any(fresh_deme.home.glob("store/finetune/*/manifest.json")))
    finally:
        servers, orphans = _children_of(run.pid), _workers_of(run.pid)
        run.kill()
        run.wait()
        for pid in servers:  # Prefect's temporary server outlives a process that was killed.
            if _command(pid).find("uvicorn") >= 0:
                os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in orphans))

    report = fresh_deme.report("run", write_recipe())
    assert report["merged"]["weights_digest"] == first_report["merged"]["weights_digest"]
    assert report["rows"] == first_report["rows"]
    left = [path for path in fresh_deme.home.glob("store/checkpoints/**/*") if path.is_file()]
    assert not left, "checkpoints of finished runs must go"


def _workers_of(pid: int) -> list[int]:
    return [child for child in _children_of(pid) if "tasks.worker" in _command(child)]


def _children_of(pid: int) -> list[int]:
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            children.append(int(stat.parent.name))
    return children


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""
