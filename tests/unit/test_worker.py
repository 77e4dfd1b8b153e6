"""How a Prefect worker is stopped; `tests/faults/test_services.py` stops a real one in a training."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import UUID, uuid4

import psutil
import pytest

from flows import worker
from flows.stack.leftovers import remove_workspaces

ENDS_POLITELY = (
    "import pathlib, signal, sys, time; told = pathlib.Path(sys.argv[1])\n"
    "def leave(*_): time.sleep(0.5); told.write_text('done'); sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, leave); print(flush=True); time.sleep(60)"
)
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


def _start(script: str, *arguments: str, run: UUID | None) -> "subprocess.Popen[bytes]":
    environment = {"PREFECT__FLOW_RUN_ID": str(run)} if run else {}
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    return process


def test_flow_runs_end_by_themselves_before_their_worker_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polite, deaf = uuid4(), uuid4()
    told: list[UUID] = []
    monkeypatch.setattr(worker, "_crash", lambda runs, _: told.extend(runs))
    processes = [
        _start(ENDS_POLITELY, str(tmp_path / "checkpoint"), run=polite),
        _start(DEAF, run=deaf),
        _start(ENDS_POLITELY, str(tmp_path / "not a flow run"), run=None),
    ]
    try:
        began = time.monotonic()
        worker.end_flow_runs([psutil.Process(p.pid) for p in processes], seconds=2.0)
        assert 2.0 <= time.monotonic() - began < 4.0, "one was deaf"
        assert (tmp_path / "checkpoint").read_text() == "done"
        assert processes[2].poll() is None
        assert told == [polite, deaf]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(("given", "seconds"), [(None, 38.0), ("600", 613.0)])
def test_flow_runs_have_longer_than_the_checkpoints_of_their_trainings(
    given: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEME_STOP_SECONDS", raising=False)
    if given:
        monkeypatch.setenv("DEME_STOP_SECONDS", given)
    had: list[float] = []

    def prefects_own() -> None:
        worker.processutils.setup_signal_handlers_worker()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(worker, "end_flow_runs", lambda _, *, seconds: had.append(seconds))
    monkeypatch.setattr(worker, "prefect_command", prefects_own)
    monkeypatch.setattr(
        worker.processutils,
        "setup_signal_handlers_worker",
        lambda: [signal.signal(each, lambda *_: None) for each in worker._SIGNALS],
    )
    monkeypatch.setattr(sys, "argv", [])
    before = {each: signal.getsignal(each) for each in worker._SIGNALS}
    try:
        worker.start_worker(["--pool", "deme-cpu"])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert had == [seconds]


def test_workspaces_of_killed_workers_are_removed_with_the_keys_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    manifests = {"ours": {"DEME_STACK": "/home/a"}, "theirs": {"DEME_STACK": "/home/b"}, "foreign": {}}
    for name, environment in manifests.items():
        folder = tmp_path / f"prefect-workspace-attempt-{name}"
        folder.mkdir()
        (folder / "workspace.json").write_text(json.dumps({"environment": environment}))
    (tmp_path / "prefect-workspace-attempt-begun").mkdir()
    remove_workspaces("/home/a")
    left = {path.name.rpartition("-")[2] for path in tmp_path.iterdir()}
    assert left == {"theirs", "foreign", "begun"}
