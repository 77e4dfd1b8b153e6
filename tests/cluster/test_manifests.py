"""What `deployments/` has for Kubernetes, against the schemas of Kubernetes 1.37, unknown fields being errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.utilities.templating import apply_values, find_placeholders

from tasks import ray_leave

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
TEMPLATE = DEPLOYMENTS / "work_pools" / "kubernetes.json"
RAY_CLUSTER = DEPLOYMENTS / "kubernetes" / "ray-cluster.yaml"
ENVIRONMENT = [{"configMapRef": {"name": "deme"}}, {"secretRef": {"name": "deme"}}]
REQUIRED = {"DEME_STORE_URI", "MLFLOW_TRACKING_URI"}


def _validate(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.37", strict=True)


def _job(**values: Any) -> dict[str, Any]:
    """The manifest that a Prefect worker makes of the template, as `prefect_kubernetes` fills it in."""
    template = json.loads(TEMPLATE.read_text())
    properties = template["variables"]["properties"]
    defaults = {name: property["default"] for name, property in properties.items() if "default" in property}
    values = defaults | {"name": "run", "command": ["prefect"], "labels": {"a": "b"}} | values
    filled = apply_values(template["job_configuration"], values, remove_notset=True)
    manifest: dict[str, Any] = filled["job_manifest"]
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    given = [{"name": name, "value": value} for name, value in filled["env"].items()]
    container["env"] = [*given, *(each for each in container["env"] if each["name"] not in filled["env"])]
    return manifest


def test_the_work_pool_template_is_one_that_prefect_accepts() -> None:
    template = json.loads(TEMPLATE.read_text())
    WorkPoolCreate(name="deme-gpu", type="kubernetes", base_job_template=template)
    used = {placeholder.name for placeholder in find_placeholders(template["job_configuration"])}
    assert used == set(template["variables"]["properties"])


@pytest.mark.parametrize("values", [{}, {"gpu_limit": 1, "cpu_limit": "8", "memory_request": "64Gi"}])
def test_jobs_of_the_work_pool_are_valid(values: dict[str, Any]) -> None:
    job = _job(**values)
    _validate(job)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == values.get("gpu_limit", 0)
    assert container["envFrom"] == ENVIRONMENT


def test_a_job_of_the_work_pool_does_not_start_without_store_and_tracking() -> None:
    def sources(**env: str) -> dict[str, dict[str, Any]]:
        (container,) = _job(env=env)["spec"]["template"]["spec"]["containers"]
        return {each.pop("name"): each for each in container["env"]}

    for name in REQUIRED:
        reference = sources()[name]["valueFrom"]["configMapKeyRef"]
        assert reference == {"name": "deme", "key": name}  # Kubernetes refuses the pod if it is not there.
        assert sources(**{name: "other"})[name] == {"value": "other"}


def _pods() -> Iterator[tuple[str, dict[str, Any]]]:
    spec = yaml.safe_load(RAY_CLUSTER.read_text())["spec"]
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


@pytest.mark.parametrize(("name", "template"), list(_pods()))
def test_pods_of_the_ray_cluster_are_valid(name: str, template: dict[str, Any]) -> None:
    _validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template})


@pytest.mark.parametrize(
    ("name", "spec"), [("job", _job()["spec"]["template"]["spec"]), *((name, pod["spec"]) for name, pod in _pods())]
)
def test_pods_are_what_restricted_namespaces_admit(name: str, spec: dict[str, Any]) -> None:
    """The level "restricted" of Kubernetes' Pod Security Standards."""
    of_pod = spec["securityContext"]
    assert of_pod["runAsNonRoot"] and of_pod["runAsUser"] > 0, name
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}, name
    options = yaml.safe_load(RAY_CLUSTER.read_text())["spec"]["autoscalerOptions"]
    for each in (*(container["securityContext"] for container in spec["containers"]), options["securityContext"]):
        assert each == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, name
    assert {kind for volume in spec["volumes"] for kind in volume if kind != "name"} == {"emptyDir"}, name


def test_only_the_gpu_group_reserves_gpus_and_the_head_takes_no_job() -> None:
    requests = {name: pod["spec"]["containers"][0]["resources"]["requests"] for name, pod in _pods()}
    assert {name for name, each in requests.items() if "nvidia.com/gpu" in each} == {"gpu"}
    head = yaml.safe_load(RAY_CLUSTER.read_text())["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_every_ray_node_tells_its_workers_before_it_ends() -> None:
    for name, pod in _pods():
        (container,) = pod["spec"]["containers"]
        _, *command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["-m", ray_leave.__name__, "--root", "1"], name
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 2 * 30, name  # Ray waits for half a minute.


def test_the_example_of_a_config_map_has_what_pods_need_and_no_secret() -> None:
    config = yaml.safe_load((DEPLOYMENTS / "kubernetes" / "config.example.yaml").read_text())
    _validate(config)
    assert config["metadata"]["name"] == "deme"
    assert config["data"].keys() == REQUIRED | {"AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"}


def test_secrets_are_references() -> None:
    for secret in yaml.safe_load_all((DEPLOYMENTS / "kubernetes" / "secret.example.yaml").read_text()):
        _validate(secret)
        assert set(secret["stringData"].values()) <= {"fill-in", "token"}
    for name, pod in _pods():
        (container,) = pod["spec"]["containers"]
        assert container["envFrom"] == ENVIRONMENT, name
        named = {variable["name"] for variable in container["env"]}
        assert not {word for word in named if "KEY" in word or "TOKEN" in word}
