import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flows.deploy import POOLS, _make_pool

ROOT = Path(__file__).parents[2]


def test_every_file_names_the_image_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = [path for path in (ROOT / "deployments").rglob("*") if path.is_file()]
    named = {
        path.name: set(re.findall(r"\bdeme:([\w.]+)", path.read_text()))
        for path in (*files, ROOT / "docker-compose.yml", ROOT / "docs" / "operations.md")
    }
    tagged = {name: tags for name, tags in named.items() if tags}
    assert tagged.keys() == {
        "Dockerfile",
        "docker.json",
        "kubernetes.json",
        "ray-cluster.yaml",
        "docker-compose.yml",
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
        _make_pool(client, name, description, "kubernetes")
    assert limits == {"deme-cpu": 0, "deme-gpu": 1}
