"""docker-compose.yml against the compose specification and our promises; the engine itself is in tests/compose."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return dict(content["services"])


def test_it_follows_the_compose_specification() -> None:
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / "docker-compose.yml")]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ports_are_bound_to_loopback(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_object_store_answers_by_http_to_whoever_has_a_key(services: dict[str, Any]) -> None:
    assert "-disableHttp" in services["s3"]["command"].split()
    environment = services["s3"]["environment"]
    assert environment["WEED_JWT_SIGNING_KEY"] == environment["WEED_JWT_SIGNING_READ_KEY"] == "${S3_SECRET_KEY}"


def test_prefect_is_heard_by_whoever_knows_its_password(services: dict[str, Any]) -> None:
    server = services["prefect"]["environment"]
    assert server["PREFECT_SERVER_API_AUTH_STRING"].startswith("deme:${PREFECT_PASSWORD:?")
    assert server["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == (
        "${PREFECT_PUBLIC_URL:-http://127.0.0.1:4200},http://localhost:${PREFECT_PORT:-4200}"
    )
    for name in ("worker", "worker-gpu", "setup"):
        assert services[name]["environment"]["PREFECT_API_AUTH_STRING"] == "deme:${PREFECT_PASSWORD}", name


def test_images_are_pinned(services: dict[str, Any]) -> None:
    base = re.findall(r"^ARG BASE=(.*)$", (ROOT / "deployments" / "Dockerfile").read_text(), re.MULTILINE)
    for image in (*base, *(service["image"] for service in services.values())):
        assert re.search(r":\d+\.\d+", image), image


def test_what_starts_after_another_waits_until_it_is_healthy(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            finished = {"setup": "service_completed_successfully"}.get(needed, "service_healthy")
            assert how["condition"] == finished, (name, needed)
            assert needed == "setup" or services[needed]["healthcheck"]["test"], needed


def test_every_variable_is_in_the_example_and_no_secret_has_a_value() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    example = dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used == set(example)
    required = set(re.findall(r"\$\{(\w+):\?", text))
    may_stay_empty = set(re.findall(r"\$\{(\w+):-\}", text))
    assert required | may_stay_empty == {name for name, value in example.items() if not value}
    assert {"POSTGRES_PASSWORD", "PREFECT_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"} == required


def test_secrets_are_on_no_command_line(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert not re.search(r"PASSWORD|SECRET|ACCESS_KEY", str(service.get("command", ""))), name


def test_our_version_is_the_image_tag(services: dict[str, Any]) -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert services["worker"]["image"] == f"deme:{version[1]}"
