"""Registers work pools, deployments and automations with a Prefect server.

Again and again, it changes nothing. What was set on the server since stays: values of parameters, schedules, a pause,
job variables and so on of deployments, job templates of pools, and whether an automation is on. What a deployment has
of the code is brought up to date, and the tag and parameters of prefect.yaml that the server lacks are added.
"""

import contextlib
import io
import json
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import httpx
import yaml
from prefect import Flow
from prefect.cli import app as prefect_command
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events import DeploymentTriggerTypes
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter

from deme_core.digests import json_digest
from deme_core.errors import DemeError
from flows.stack.services import CPU_POOL, GPU_POOL

DEPLOYMENTS_FOLDER = Path(__file__).resolve().parent.parent / "deployments"
POOLS = {
    CPU_POOL: "Flows, and the work of recipes that need no GPU.",
    GPU_POOL: "Machines with GPUs.",
}
# In a template's schema: the digest of what `deploy` wrote, so that what others changed is told from it.
_WRITTEN = "$comment"
PoolType = Literal["process", "kubernetes"]


def import_flows() -> None:
    """Imports every flow that is deployed; `deploy` would do it later."""
    for deployment in _read("prefect.yaml")["deployments"]:
        import_module(deployment["entrypoint"].rpartition(".")[0])


def deploy(pool_type: PoolType = "process", say: Callable[[str], None] = lambda _: None) -> list[str]:
    """Makes the server of PREFECT_API_URL know everything DeMe offers.

    Args:
        pool_type: what the work pools start flow runs in.
        say: takes a line about what was left as it is.

    Returns:
        The deployments, as ``flow/deployment``.

    Raises:
        DemeError: a pool is of another type, parameters on the server do not fit a flow, or `prefect deploy` fails.
        PrefectHTTPStatusError: the server refuses something else, as whoever does not log in.
    """
    with get_client(sync_client=True) as client:
        for name, description in POOLS.items():
            _make_pool(client, name, description, pool_type, say)
        content = _read("prefect.yaml")
        names = {_full_name(deployment): deployment for deployment in content["deployments"]}
        there = {name: found for name in names if (found := _find(client, name)) is not None}
        # With the version that an update would give it: Prefect's own is the commit of the current folder.
        new = [{**each, "version": _flow_of(each).version} for name, each in names.items() if name not in there]
        if new:
            _register({**content, "deployments": new})
        for name, found in there.items():
            _update(client, name, found, names[name])
        for deployment in content["deployments"]:
            for trigger in deployment.get("triggers", ()):
                _delete_orphans(client, trigger["name"])
        for automation in _read("automations.yaml")["automations"]:
            _make_automation(
                client, AutomationCore.model_validate(automation), client.read_automations_by_name(automation["name"])
            )
        return sorted(names)


def _flow_of(deployment: Mapping[str, Any]) -> Flow[..., Any]:
    module, _, function = deployment["entrypoint"].rpartition(".")
    found: Flow[..., Any] = getattr(import_module(module), function)
    return found


def _full_name(deployment: Mapping[str, Any]) -> str:
    return f"{_flow_of(deployment).name}/{deployment['name']}"


def _find(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def _make_pool(
    client: SyncPrefectClient, name: str, description: str, pool_type: PoolType, say: Callable[[str], None]
) -> None:
    file = DEPLOYMENTS_FOLDER / "work_pools" / f"{pool_type}.json"
    template = json.loads(file.read_text())
    if name == GPU_POOL and pool_type == "kubernetes":
        template["variables"]["properties"]["gpu_limit"]["default"] = 1
    digest = _digest(template)
    template["variables"][_WRITTEN] = digest
    wanted = WorkPoolCreate(name=name, description=description, type=pool_type, base_job_template=template)
    # First, since a worker that is starting makes its pool too, if it finds none.
    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(wanted)
        return
    found = client.read_work_pool(name)
    if found.type != pool_type:
        raise DemeError(
            f"Work pool {name} is of type {found.type}, not {pool_type}; delete it first, or keep its type."
        )
    if found.base_job_template == template:
        return
    written_by_us = found.base_job_template.get("variables", {}).get(_WRITTEN)
    if _digest(found.base_job_template) in (written_by_us, digest, _digest(_template_of_prefect())):
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template, description=description))
    else:
        say(
            f"work pool {name} keeps its base job template, which was changed on the server or is of an older DeMe; "
            f"for DeMe's: prefect work-pool update {name} --base-job-template {file}"
        )


def _template_of_prefect() -> dict[str, Any]:
    """Returns what a pool has that a worker made since it found none."""
    from prefect.workers.process import ProcessWorker  # Rarely needed.

    return ProcessWorker.get_default_base_job_template()


def _digest(template: Mapping[str, Any]) -> str:
    """Returns the digest of a job template but for the digest that it holds."""
    variables = {name: value for name, value in template.get("variables", {}).items() if name != _WRITTEN}
    return json_digest({**template, "variables": variables})


def _update(
    client: SyncPrefectClient, full_name: str, found: DeploymentResponse, deployment: Mapping[str, Any]
) -> None:
    """Tells the server what has changed in the code of a deployment that is there, and which tag or parameter it lacks.

    `prefect deploy` would end a pause, replace schedules and job variables, and show what is secret in the latter.
    """
    flow = _flow_of(deployment)
    wanted = {
        "entrypoint": deployment["entrypoint"],
        "version": flow.version,
        "parameter_openapi_schema": parameter_schema(flow).model_dump(mode="json", exclude_unset=True),
        "parameters": deployment.get("parameters", {}) | found.parameters,
        "tags": [*found.tags, *(tag for tag in deployment["tags"] if tag not in found.tags)],
    }
    changes = {name: value for name, value in wanted.items() if getattr(found, name) != value}
    if changes:
        try:
            client.update_deployment(found.id, DeploymentUpdate.model_validate(changes))
        except PrefectHTTPStatusError as error:
            if error.response.status_code != httpx.codes.CONFLICT:
                raise
            raise DemeError(
                f"Deployment {full_name} has parameters on the server that its flow does not take; correct them there: "
                f"{error.response.text}"
            ) from error
    _update_triggers(client, found, deployment.get("triggers", ()))


def _update_triggers(
    client: SyncPrefectClient, found: DeploymentResponse, triggers: Iterable[Mapping[str, Any]]
) -> None:
    of_it = client.read_resource_related_automations(f"prefect.deployment.{found.id}")
    for content in triggers:
        trigger = TypeAdapter[DeploymentTriggerTypes](DeploymentTriggerTypes).validate_python(content)
        trigger.set_deployment_id(found.id)
        _make_automation(client, trigger.as_automation(), of_it)


def _delete_orphans(client: SyncPrefectClient, name: str) -> None:
    """Deletes automations of this name that start nothing but deployments that are gone: Prefect leaves them there."""
    for automation in client.read_automations_by_name(name):
        started = [getattr(action, "deployment_id", None) for action in automation.actions]
        if started and not any(each is None or _exists(client, each) for each in started):
            client.delete_automation(automation.id)


def _exists(client: SyncPrefectClient, deployment: UUID) -> bool:
    try:
        client.read_deployment(deployment)
    except ObjectNotFound:
        return False
    return True


def _register(content: Mapping[str, Any]) -> None:
    """Does what `prefect deploy` does, in this process: another one would import Prefect and all flows once more."""
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        _shared_tls_contexts(),
    ):
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(content))
        try:
            with _command_line("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)):
                prefect_command()
        except SystemExit as end:
            if end.code:
                last = [line.strip() for line in said.getvalue().splitlines() if line.strip()][-5:]
                raise DemeError(f"prefect deploy failed: {' '.join(last)}") from None


@contextlib.contextmanager
def _command_line(*words: str) -> Iterator[None]:
    before = sys.argv
    sys.argv = list(words)
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _shared_tls_contexts() -> Iterator[None]:
    """Makes one TLS context for all clients: Prefect makes forty, and each reads all root certificates in 20 ms."""
    before = ssl.create_default_context
    ssl.create_default_context = cache(before)  # type: ignore[assignment]
    try:
        yield
    finally:
        ssl.create_default_context = before


def _make_automation(client: SyncPrefectClient, automation: AutomationCore, there: Iterable[Automation]) -> None:
    found = next((each for each in there if each.name == automation.name), None)
    if found is None:
        client.create_automation(automation)
        return
    # The owner is told to the server once, and never told by it.
    wanted = automation.model_dump(exclude={"owner_resource"}) | {"enabled": found.enabled}
    if found.model_dump(exclude={"id", "owner_resource"}) != wanted:
        client.update_automation(found.id, AutomationCore.model_validate(wanted))


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOYMENTS_FOLDER / name).read_text())
    return content
