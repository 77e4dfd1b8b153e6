import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from selenium import webdriver

from flows.stack import services
from flows.stack.ports import NAMES
from flows.stack.processes import stop_tree
from tests.e2e.browser import open_browser
from tests.e2e.command_line import CommandLine
from tests.e2e.stack_platform import Platform, belongs
from tests.e2e.waiting import wait_for
from tests.integration.conftest import free_ports

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
    "merge": {"search": {"max_candidates": 3, "num_images": 8, "guards": ["fd_pixels_4x4"]}},
    "evaluate": {
        "num_images": 8,
        "batch_size": 4,
        "num_inference_steps": 4,
        "extractor": "efficientnet_lite0",
        "more_extractors": ["pixels_4x4"],
        "extractor_resolution": 32,
        "kid_subset_size": 4,
    },
    # To start a process takes longer than its share of the work; test_prompted_run has two of them side by side.
    "execution": {"num_workers": 1, "device": "cpu"},
}


WriteRecipe = Callable[..., str]


@pytest.fixture(scope="session")
def write_recipe(tmp_path_factory: pytest.TempPathFactory) -> WriteRecipe:
    """Writes the toy recipe, with whole sections replaced by keyword, and returns its path."""

    def write(**sections: Any) -> str:
        path = tmp_path_factory.mktemp("recipe") / "toy.yaml"
        path.write_text(yaml.safe_dump(TOY_RECIPE | sections))
        return str(path)

    return write


@pytest.fixture(scope="package")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """One Prefect server for all commands: five seconds of processor time less for each."""
    layout = services.Layout(tmp_path_factory.mktemp("prefect"), dict.fromkeys(NAMES, free_ports(1)[0]))
    service = services.prefect(layout)
    service.prepare()
    with (layout.home / "log").open("wb") as log:
        process = subprocess.Popen(service.command, env=dict(service.environment), stdout=log, stderr=log)
    try:
        wait_for(lambda: _answers(service))
        known = layout.client_environment()
        yield {name: known[name] for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")}
    finally:
        stop_tree(psutil.Process(process.pid), seconds=15.0)
        process.wait()


def _answers(service: services.Service) -> bool:
    try:
        service.check()
    except httpx.HTTPError:
        return False
    return True


@pytest.fixture(scope="package")
def deme(tmp_path_factory: pytest.TempPathFactory, prefect_api: Mapping[str, str]) -> CommandLine:
    """One state folder for the tests that build on one another's artifacts."""
    return CommandLine(tmp_path_factory.mktemp("home"), prefect_api)


@pytest.fixture(scope="package")
def evaluated(
    deme: CommandLine,
    first_report: dict[str, Any],
    write_recipe: WriteRecipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The merged model of the first run, exported into a folder of an awkward name, and evaluated by itself."""
    out = tmp_path_factory.mktemp("models") / "of {mine} 100%"
    done = deme.run("export", first_report["mlflow_run_id"][:12], "--out", str(out))
    assert done.returncode == 0, done.stderr
    return deme.report("evaluate", str(out), "--recipe", write_recipe())


@pytest.fixture
def fresh_deme(tmp_path: Path, prefect_api: Mapping[str, str]) -> CommandLine:
    return CommandLine(tmp_path / "home", prefect_api)


@pytest.fixture(scope="package")
def first_report(deme: CommandLine, write_recipe: WriteRecipe) -> dict[str, Any]:
    """The report of the toy recipe, run once for the session, without any server."""
    return replace(deme, prefect_api={}).report("run", write_recipe())


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with open_browser() as found:
        yield found


@pytest.fixture(scope="package")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    deme = CommandLine(tmp_path_factory.mktemp("platform"))
    done = deme.run("up")
    assert done.returncode == 0, done.stderr
    try:
        exported = [line.removeprefix("export ").split("=", 1) for line in deme.run("env").stdout.splitlines()]
        yield Platform(deme, {name: value.strip("'") for name, value in exported})
    finally:
        deme.run("down")
        left = [p for p in psutil.process_iter() if belongs(p, deme.home)]
        assert not left, left


@pytest.fixture(scope="package")
def full_report(platform: Platform, write_recipe: WriteRecipe) -> dict[str, Any]:
    return platform.report(write_recipe())


@pytest.fixture(scope="package")
def second_report(platform: Platform, full_report: dict[str, Any], write_recipe: WriteRecipe) -> dict[str, Any]:
    """The report of the same recipe, run once more."""
    return platform.report(write_recipe())
