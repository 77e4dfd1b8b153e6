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

from flows.stack.services import CPU_POOL, HEARTBEAT_SECONDS
from tasks import ray_leave

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
TEMPLATE = DEPLOYMENTS / "work_pools" / "kubernetes.json"
RAY_CLUSTER = DEPLOYMENTS / "kubernetes" / "ray-cluster.yaml"
WORKER = {each["kind"]: each for each in yaml.safe_load_all((DEPLOYMENTS / "kubernetes" / "worker.yaml").read_text())}
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


@pytest.mark.parametrize(
    "values", [{}, {"gpu_limit": 1, "cpu_limit": "8", "memory_request": "64Gi", "termination_grace_period": 45}]
)
def test_jobs_of_the_work_pool_are_valid(values: dict[str, Any]) -> None:
    job = _job(**values)
    _validate(job)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == values.get("gpu_limit", 0)
    assert container["envFrom"] == ENVIRONMENT
    seconds = job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert seconds == values.get("termination_grace_period", 30)


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


@pytest.mark.parametrize("kind", ["ServiceAccount", "Role", "RoleBinding", "Deployment"])
def test_manifests_of_the_worker_are_valid(kind: str) -> None:
    _validate(WORKER[kind])


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("job", _job()["spec"]["template"]["spec"]),
        ("worker", WORKER["Deployment"]["spec"]["template"]["spec"]),
        *((name, pod["spec"]) for name, pod in _pods()),
    ],
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


def test_one_group_has_single_gpus_one_whole_machines_and_the_head_takes_no_job() -> None:
    requests = {name: pod["spec"]["containers"][0]["resources"]["requests"] for name, pod in _pods()}
    gpus = {name: int(each["nvidia.com/gpu"]) for name, each in requests.items() if "nvidia.com/gpu" in each}
    assert gpus == {"gpu": 1, "gpus": 8}  # Trainings of several processes need all their GPUs on one node.
    groups = yaml.safe_load(RAY_CLUSTER.read_text())["spec"]["workerGroupSpecs"]
    assert {each["groupName"]: each["minReplicas"] for each in groups} == {"gpu": 0, "gpus": 0, "cpu": 0}
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
    assert config["data"].keys() == REQUIRED | {"PREFECT_API_URL", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"}


def test_the_worker_may_do_what_it_needs_in_its_own_namespace_and_no_more() -> None:
    allowed = {
        (resource, verb) for rule in WORKER["Role"]["rules"] for resource in rule["resources"] for verb in rule["verbs"]
    }
    reads = {(resource, verb) for resource in ("pods", "pods/log") for verb in ("get", "list", "watch")}
    of_jobs = {("jobs", verb) for verb in ("get", "list", "watch", "create", "delete")}
    assert allowed == reads | of_jobs
    account = WORKER["ServiceAccount"]["metadata"]["name"]
    (subject,) = WORKER["RoleBinding"]["subjects"]
    # A binding without the namespace is valid by the schema, and refused by the cluster.
    template = json.loads(TEMPLATE.read_text())["variables"]["properties"]
    assert subject == {"kind": "ServiceAccount", "name": account, "namespace": template["namespace"]["default"]}
    assert WORKER["RoleBinding"]["roleRef"]["name"] == WORKER["Role"]["metadata"]["name"]
    assert WORKER["Deployment"]["spec"]["template"]["spec"]["serviceAccountName"] == account


def test_the_worker_serves_the_pool_that_it_is_named_after_and_no_secret_is_in_it() -> None:
    (container,) = WORKER["Deployment"]["spec"]["template"]["spec"]["containers"]
    arguments = container["args"]
    assert arguments[arguments.index("--pool") + 1] == WORKER["Deployment"]["metadata"]["name"] == CPU_POOL
    env = {each["name"]: each.get("value") or each["valueFrom"] for each in container["env"]}
    key = {"name": "deme", "key": "PREFECT_API_AUTH_STRING"}
    assert env["PREFECT_API_AUTH_STRING"] == {"secretKeyRef": key | {"optional": True}}
    of_jobs = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    assert {"name": env[f"{of_jobs}_NAME"], "key": env[f"{of_jobs}_KEY"]} == key
    namespace = {"fieldRef": {"fieldPath": "metadata.namespace"}}
    assert env["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"] == namespace


def test_flow_runs_send_the_heartbeats_that_the_automation_waits_for() -> None:
    (container,) = _job()["spec"]["template"]["spec"]["containers"]
    assert {"name": "PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "value": str(HEARTBEAT_SECONDS)} in container["env"]
    (container,) = _job(env={"DEME_HOME": "/other"})["spec"]["template"]["spec"]["containers"]
    assert "PREFECT_FLOWS_HEARTBEAT_FREQUENCY" in {each["name"] for each in container["env"]}


def test_secrets_are_references() -> None:
    for secret in yaml.safe_load_all((DEPLOYMENTS / "kubernetes" / "secret.example.yaml").read_text()):
        _validate(secret)
        assert set(secret["stringData"].values()) <= {"fill-in", "token"}
    for name, pod in _pods():
        (container,) = pod["spec"]["containers"]
        assert container["envFrom"] == ENVIRONMENT, name
        named = {variable["name"] for variable in container["env"]}
        assert not {word for word in named if "KEY" in word or "TOKEN" in word}
