import json
import re
import tomllib
from fnmatch import fnmatch
from inspect import isfunction, signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import states
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectAlreadyExists
from prefect.flows import load_flow_from_entrypoint
from prefect.workers.process import ProcessWorker

from flows.deploy import POOLS, _digest, _make_pool, _read

ROOT = Path(__file__).parents[2]


def test_every_file_names_the_image_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = [path for path in (ROOT / "deployments").rglob("*") if path.is_file()]
    named = {
        path.name: set(re.findall(r"\bdeme:([\w.]+)", path.read_text()))
        for path in (*files, ROOT / "docker-compose.yml", *(ROOT / "docs").glob("*.md"))
    }
    tagged = {name: tags for name, tags in named.items() if tags}
    assert tagged.keys() == {
        "Dockerfile",
        "kubernetes.json",
        "ray-cluster.yaml",
        "docker-compose.yml",
        "clusters.md",
        "operations.md",
    }
    assert set().union(*tagged.values()) == {version}


def test_pods_have_shared_memory_for_data_loaders_and_the_disk_of_ray_nodes() -> None:
    template = json.loads((ROOT / "deployments" / "work_pools" / "kubernetes.json").read_text())
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    # Kubernetes gives 64 MiB; Compose gives 2 GB.
    assert volumes[mounted["/dev/shm"]] == {"medium": "Memory", "sizeLimit": "2Gi"}
    size = template["variables"]["properties"]["home_size_limit"]["default"]
    ray_nodes = (ROOT / "deployments" / "kubernetes" / "ray-cluster.yaml").read_text()
    assert f"{{name: home, emptyDir: {{sizeLimit: {size}}}}}" in ray_nodes


def test_pods_of_the_gpu_pool_ask_for_a_gpu() -> None:
    limits: dict[str, int] = {}

    def create(pool: Any) -> None:
        limits[pool.name] = pool.base_job_template["variables"]["properties"]["gpu_limit"]["default"]

    client: Any = SimpleNamespace(create_work_pool=create)
    for name, description in POOLS.items():
        _make_pool(client, name, description, "kubernetes", print)
    assert limits == {"deme-cpu": 0, "deme-gpu": 1}


class Server:
    """Knows one work pool."""

    def __init__(self) -> None:
        self.pool: Any = None

    def create_work_pool(self, pool: Any) -> None:
        if self.pool is not None:
            raise ObjectAlreadyExists(Exception("there"))
        self.pool = SimpleNamespace(
            **{name: getattr(pool, name) for name in ("type", "base_job_template", "description")}
        )

    def read_work_pool(self, name: str) -> Any:
        return self.pool

    def update_work_pool(self, name: str, change: Any) -> None:
        self.pool.base_job_template = change.base_job_template


def test_a_job_template_is_kept_up_to_date_until_somebody_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server, said = Server(), list[str]()

    def deploy() -> Any:
        client: Any = server
        _make_pool(client, "deme-cpu", "", "process", said.append)
        return server.pool.base_job_template

    def env(template: Any) -> Any:
        return template["variables"]["properties"]["env"]

    first = deploy()
    assert deploy() == first
    env(first)["default"] = {"OLD": "1"}
    first["variables"]["$comment"] = _digest(first)
    assert "default" not in env(deploy()), "what an older DeMe wrote is replaced"
    server.pool.base_job_template = ProcessWorker.get_default_base_job_template()
    assert "$comment" in deploy()["variables"], "and what a worker made that was there first"
    env(server.pool.base_job_template)["default"] = {"HTTPS_PROXY": "proxy"}
    assert not said
    for _ in range(2):  # With the digest of what we wrote, and from a file of somebody's own.
        assert env(deploy())["default"] == {"HTTPS_PROXY": "proxy"}
        server.pool.base_job_template["variables"].pop("$comment", None)
    assert [line.partition(", which was changed")[0] for line in said] == [
        "work pool deme-cpu keeps its base job template"
    ] * 2


def test_the_worker_of_kubernetes_has_the_prefect_of_the_lock() -> None:
    (locked,) = re.findall(r"^prefect==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    worker = (ROOT / "deployments" / "kubernetes" / "worker.yaml").read_text()
    python = re.search(r"^ARG BASE=python:(3\.\d+)", (ROOT / "deployments" / "Dockerfile").read_text(), re.MULTILINE)
    assert python and f"image: prefecthq/prefect:{locked}-python{python[1]}-kubernetes\n" in worker


def test_finished_pods_are_removed_and_nodes_with_gpus_are_reached() -> None:
    template = json.loads((ROOT / "deployments" / "work_pools" / "kubernetes.json").read_text())
    properties = template["variables"]["properties"]
    assert properties["finished_job_ttl"]["default"] == 3600
    assert [each["key"] for each in properties["tolerations"]["default"]] == ["nvidia.com/gpu"]
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    for name in ("tolerations", "nodeSelector", "imagePullSecrets"):
        assert pod[name].strip("{ }") in properties


def _called_crashed() -> dict[str, Any]:
    automation: dict[str, Any]
    (automation,) = _read("automations.yaml")["automations"]
    return automation


def test_only_runs_that_should_have_a_process_are_called_crashed() -> None:
    made = [function(cls=State) for function in vars(states).values() if _makes_a_state(function)]
    waiting_or_ended = {state.name for state in made if not (state.is_running() or state.is_cancelling())}
    assert {"AwaitingRetry", "InfrastructurePending", "Suspended", "Failed"} < waiting_or_ended
    expected = {event.removeprefix("prefect.flow-run.") for event in _called_crashed()["trigger"]["expect"]}
    assert expected == waiting_or_ended | {"heartbeat"}


def _makes_a_state(function: Any) -> bool:
    """Whether it is one of Prefect's functions that are named as the state that they return."""
    is_public = isfunction(function) and function.__name__[0].isupper()
    return is_public and function.__module__ == states.__name__ and "cls" in signature(function).parameters


def test_only_our_own_runs_are_called_crashed() -> None:
    automation = _called_crashed()
    related = automation["trigger"]["match_related"]
    assert related["prefect.resource.role"] == "flow"
    flows = {load_flow_from_entrypoint(each["entrypoint"]).name for each in _read("prefect.yaml")["deployments"]}
    patterns = related["prefect.resource.name"]
    assert all(any(fnmatch(flow, pattern) for pattern in patterns) for flow in flows), flows
