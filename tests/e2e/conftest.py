import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml

TOY_RECIPE: dict[str, Any] = {
    "name": "toy",
    "pretrained": {
        "source": "pretrain",
        "unet": {
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "norm_num_groups": 4,
            "attention_head_dim": 4,
        },
        "training": {"num_steps": 8, "batch_size": 8, "learning_rate": 1e-3},
    },
    "dataset": {"source": "digits", "num_images": 64},
    "segments": {"count": 2},
    "finetune": {"num_steps": 8, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 4},
    "merge": {"search": {"max_candidates": 3, "num_images": 8}},
    "evaluate": {
        "num_images": 8,
        "num_inference_steps": 2,
        "extractor": "efficientnet_lite0",
        "extractor_resolution": 32,
        "kid_subset_size": 4,
    },
    "execution": {"num_workers": 2, "device": "cpu"},
}


@dataclass(frozen=True)
class CommandLine:
    """The ``deme`` command in a state folder of its own, as a user runs it."""

    home: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_", "MLFLOW_", "DEME_"))}
        return kept | {"DEME_HOME": str(self.home), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}

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


WriteRecipe = Callable[..., str]


@pytest.fixture(scope="session")
def write_recipe(tmp_path_factory: pytest.TempPathFactory) -> WriteRecipe:
    """Writes the toy recipe, with whole sections replaced by keyword, and returns its path."""

    def write(**sections: Any) -> str:
        path = tmp_path_factory.mktemp("recipe") / "toy.yaml"
        path.write_text(yaml.safe_dump(TOY_RECIPE | sections))
        return str(path)

    return write


@pytest.fixture(scope="session")
def deme(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """One state folder for the tests that build on one another's artifacts."""
    return CommandLine(tmp_path_factory.mktemp("home"))


@pytest.fixture
def fresh_deme(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "home")


@pytest.fixture(scope="session")
def first_report(deme: CommandLine, write_recipe: WriteRecipe) -> dict[str, Any]:
    """The report of the toy recipe, run once for the session."""
    return deme.report("run", write_recipe())
