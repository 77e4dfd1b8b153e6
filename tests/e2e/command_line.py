"""The ``deme`` command as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class CommandLine:
    """The ``deme`` command in a state folder of its own, as a user runs it.

    Attributes:
        home: DEME_HOME.
        prefect_api: what points at a Prefect server; without it each run starts a server of its own for a while.
    """

    home: Path
    prefect_api: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_", "MLFLOW_", "DEME_"))}
        ours = {"DEME_HOME": str(self.home), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        return kept | dict(self.prefect_api) | ours

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "flows.cli"]

    def run(
        self, *arguments: str, extra: Mapping[str, str] = MappingProxyType({}), timeout: float = 280
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*self.command, *arguments],
            env=self.environment | dict(extra),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def report(self, *arguments: str) -> dict[str, Any]:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self.command, *arguments],
            env=self.environment,
            stdout=subprocess.DEVNULL,  # A pipe would stay open for as long as any child of the command lives.
            stderr=subprocess.DEVNULL,
            text=True,
        )
