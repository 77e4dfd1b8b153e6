"""What the command line makes of its environment before anything else reads it."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest

from flows.environment import proxy_exemptions, reach_loopback_without_proxy
from flows.stack.ports import NAMES
from flows.stack.services import Layout

PROXY = {"https_proxy": "http://proxy:3128"}
BOTH = "127.0.0.1,localhost"


@pytest.mark.parametrize(
    ("environment", "exempt"),
    [
        ({}, None),
        ({"HTTP_PROXY": "", "NO_PROXY": "corp"}, None),
        ({"HTTP_PROXY": "http://proxy:3128"}, BOTH),
        ({"all_proxy": "socks5://proxy:1080", "NO_PROXY": ""}, BOTH),
        (PROXY | {"no_proxy": "corp, 10.0.0.0/8"}, f"corp,10.0.0.0/8,{BOTH}"),
        # The other one would win, and the proxy be asked for corp.
        (PROXY | {"NO_PROXY": "corp"}, f"corp,{BOTH}"),
        (PROXY | {"NO_PROXY": "corp,localhost", "no_proxy": "other,corp"}, "corp,localhost,other,127.0.0.1"),
        (PROXY | {"NO_PROXY": "*"}, "*"),
    ],
)
def test_where_a_proxy_is_named_this_machine_is_reached_without_it(
    environment: Mapping[str, str], exempt: str | None
) -> None:
    found = proxy_exemptions(environment)
    assert found == ({} if exempt is None else {"NO_PROXY": exempt, "no_proxy": exempt})
    assert proxy_exemptions({**environment, **found}) == found, "again, it adds nothing"


def test_clients_of_this_process_and_of_the_stack_ask_no_proxy_for_loopback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "corp")  # So that it is put back.
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    layout = Layout(tmp_path, dict.fromkeys(NAMES, 1))
    for variables in (layout.environment(), layout.client_environment()):
        assert variables["NO_PROXY"] == variables["no_proxy"] == f"corp,{BOTH}"
    reach_loopback_without_proxy()
    assert os.environ["no_proxy"] == f"corp,{BOTH}"
    assert urllib.request.proxy_bypass("127.0.0.1") and not urllib.request.proxy_bypass("example.org")


def test_without_a_proxy_the_environment_of_the_stack_says_nothing_of_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert not {"NO_PROXY", "no_proxy"} & Layout(tmp_path, dict.fromkeys(NAMES, 1)).client_environment().keys()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_ends_no_command(encoding: str, tmp_path: Path) -> None:
    narrow = {"PYTHONIOENCODING": encoding, "COLUMNS": "30", "DEME_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flows.cli", "recipes", "list"]
    done = subprocess.run(command, env=os.environ | narrow, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout and "Traceback" not in done.stderr
