"""docker-compose.yml on a real engine: `make test-compose`. Needs an engine, and debootstrap where no registry is."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import TOY_RECIPE
from tests.e2e.stack_platform import FINAL, Platform

ROOT = Path(__file__).resolve().parents[2]
BUILD_SECONDS = 1200

pytestmark = pytest.mark.timeout(BUILD_SECONDS + 1200)


@dataclass(frozen=True)
class Compose:
    """A compose project of its own name, with its own settings."""

    settings: Path
    project: str = field(default_factory=lambda: f"deme-test-{secrets.token_hex(3)}")

    def run(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        files = ["--project-directory", str(ROOT), "-f", str(ROOT / "docker-compose.yml")]
        done = subprocess.run(
            [*_compose_command(), *files, "--env-file", str(self.settings), "-p", self.project, *arguments],
            env=os.environ | {"DOCKER_BUILDKIT": "1", "COMPOSE_DOCKER_CLI_BUILD": "1"},
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def container(self, service: str) -> dict[str, Any]:
        identifier = self.run("ps", "-q", service).stdout.strip()
        found: dict[str, Any] = json.loads(_docker("inspect", identifier))[0]
        return found

    def logs(self) -> str:
        return self.run("logs", "--no-color", "--tail", "60", check=False).stdout


def _docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout


def _compose_command() -> list[str]:
    # The plug-in where it is, else Debian's.
    plug_in = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    return ["docker", "compose"] if plug_in else ["docker-compose"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def images() -> None:
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("needs a Docker engine (DOCKER_HOST, or the default one)")
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert weed
    subprocess.run([ROOT / "tests" / "compose" / "make-base-images.sh", weed], check=True, timeout=BUILD_SECONDS)
    dockerfile = ROOT / "deployments" / "Dockerfile"
    tag = re.search(r"image: (deme:\S+)", (ROOT / "docker-compose.yml").read_text())
    assert tag
    authority = os.environ.get("SSL_CERT_FILE")
    secret = ["--secret", f"id=ca,src={authority}"] if authority else []
    subprocess.run(
        ["docker", "build", "--quiet", *secret, "-f", dockerfile, "-t", tag[1], ROOT],
        env=os.environ | {"DOCKER_BUILDKIT": "1"},
        check=True,
        timeout=BUILD_SECONDS,
    )


@pytest.fixture(scope="module")
def compose(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    settings = tmp_path_factory.mktemp("compose") / "env"
    lines = [re.sub(r"=$", f"={secrets.token_hex(24)}", line) for line in _example().splitlines()]
    lines = [re.sub(r"(_PORT)=\d+", rf"\1={_free_port()}", line) for line in lines]
    settings.write_text("\n".join(lines))
    compose = Compose(settings)
    try:
        yield compose
    finally:
        compose.run("down", "--volumes", check=False)


def _example() -> str:
    return (ROOT / ".env.example").read_text()


@pytest.fixture(scope="module")
def platform(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """The stack, up, and the shell of a user on the host, set as docs/operations.md says."""
    started = compose.run("up", "-d", check=False)
    assert started.returncode == 0, started.stdout + started.stderr + compose.logs()
    settings = dict(line.split("=", 1) for line in compose.settings.read_text().splitlines() if re.match(r"\w+=", line))
    variables = {
        "PREFECT_API_URL": f"http://127.0.0.1:{settings['PREFECT_PORT']}/api",
        "PREFECT_API_AUTH_STRING": f"deme:{settings['PREFECT_PASSWORD']}",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{settings['MLFLOW_PORT']}",
        "DEME_STORE_URI": "s3://deme/store",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{settings['S3_PORT']}",
        "AWS_ACCESS_KEY_ID": settings["S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": settings["S3_SECRET_KEY"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return Platform(CommandLine(tmp_path_factory.mktemp("home")), variables)


def _overrides(**finetune: int) -> list[str]:
    """The toy recipe, as overrides of the one that comes with the image."""
    sections = TOY_RECIPE | {"finetune": TOY_RECIPE["finetune"] | finetune}
    return [f"{name}={json.dumps(value)}" for name, value in sections.items()]


def test_it_refuses_to_start_without_passwords(images: None, tmp_path: Path) -> None:
    settings = tmp_path / "env"
    settings.write_text(_example())
    done = Compose(settings).run("up", "-d", check=False)
    assert done.returncode != 0
    assert re.search(r"set \w+ in .env", done.stderr), done.stderr


def test_nothing_is_reached_from_other_machines_and_nobody_is_root(compose: Compose, platform: Platform) -> None:
    for service in ("postgres", "s3", "mlflow", "prefect", "worker"):
        container = compose.container(service)
        for bindings in container["NetworkSettings"]["Ports"].values():
            assert {binding["HostIp"] for binding in bindings or []} <= {"127.0.0.1"}
        if service in ("mlflow", "prefect", "worker"):
            assert container["Config"]["User"] == "deme"


def test_both_servers_have_pages_for_people(platform: Platform) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        page = httpx.get(platform.variables[name].removesuffix("/api"), timeout=30, follow_redirects=True)
        assert page.status_code == 200 and "<title>" in page.text, name


def test_a_run_survives_a_killed_worker_and_data_survive_down_and_up(compose: Compose, platform: Platform) -> None:
    flow_run = platform.start("digits", *_overrides(num_steps=200, checkpoint_every=20))
    deadline = time.monotonic() + 240
    while platform.tasks(flow_run).get("finetune segment 0 [0, 500)") != "RUNNING":
        state = platform.state(flow_run)
        assert state["type"] not in FINAL and time.monotonic() < deadline, (state, compose.logs())
        time.sleep(0.5)
    # As the kernel kills what eats its memory: the engine starts the container again, its run lost its processes.
    os.kill(compose.container("worker")["State"]["Pid"], signal.SIGKILL)
    crashed = platform.wait(flow_run, lambda state: state["type"] in FINAL, seconds=300)
    assert crashed["type"] == "CRASHED", crashed
    time.sleep(10)
    platform.prefect("flow-run", "retry", flow_run)
    platform.wait(flow_run, lambda state: state["type"] not in FINAL, seconds=30)
    assert platform.wait(flow_run, lambda state: state["type"] in FINAL, seconds=400)["type"] == "COMPLETED"
    report = _report(platform, flow_run)

    compose.run("down")
    compose.run("up", "-d")
    assert _report(platform, flow_run) == report
    again = platform.start("digits", *_overrides(num_steps=200, checkpoint_every=20))
    assert platform.wait(again, lambda state: state["type"] in FINAL, seconds=300)["type"] == "COMPLETED"
    assert _report(platform, again)["merged"] == report["merged"]
    exported = platform.deme.run("export", "--out", str(platform.deme.home / "merged"), extra=platform.variables)
    assert exported.returncode == 0, exported.stderr
    assert list((platform.deme.home / "merged").rglob("*.safetensors"))


def _report(platform: Platform, flow_run: str) -> dict[str, Any]:
    done = platform.deme.run("follow", flow_run, "--json", extra=platform.variables)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report
