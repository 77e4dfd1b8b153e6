"""Registers work pools, deployments and automations with a Prefect server.

Again and again, it changes nothing, and what was set on the server since stays: parameters and concurrency limits of
deployments, job templates of pools, and whether an automation is on.
"""

import contextlib
import io
import json
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml
from prefect.cli import app as prefect_command
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists

from deme_core.digests import canonical_json, sha256_bytes
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
        DemeError: the server refuses.
    """
    with get_client(sync_client=True) as client:
        for name, description in POOLS.items():
            _make_pool(client, name, description, pool_type, say)
        _register_deployments(client)
        for automation in _read("automations.yaml")["automations"]:
            _make_automation(client, automation)
        return sorted("/".join(names) for names in _registered(client))


def _registered(client: SyncPrefectClient) -> dict[tuple[str, str], DeploymentResponse]:
    """Returns our deployments that are there, by names of flow and deployment."""
    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=["deme"]))  # Of all the server gives the first 200.
    found = client.read_deployments(deployment_filter=ours)
    return {(client.read_flow(each.flow_id).name, each.name): each for each in found}


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
    return sha256_bytes(canonical_json({**template, "variables": variables}).encode())


def _deployments_to_register(client: SyncPrefectClient) -> dict[str, Any]:
    """Returns what prefect.yaml says, with the parameters and concurrency limits of deployments that are there."""
    content, there = _read("prefect.yaml"), _registered(client)
    for deployment in content["deployments"]:
        module, _, function = deployment["entrypoint"].rpartition(".")
        found = there.get((getattr(import_module(module), function).name, deployment["name"]))
        if found is None:
            continue
        deployment["parameters"] = deployment.get("parameters", {}) | found.parameters
        if (limit := found.global_concurrency_limit) is not None:
            strategy = found.concurrency_options and found.concurrency_options.collision_strategy
            deployment["concurrency_limit"] = {
                "limit": limit.limit,
                "collision_strategy": str(strategy.value) if strategy else "ENQUEUE",
            }
    return content


def _register_deployments(client: SyncPrefectClient) -> None:
    """Does what `prefect deploy` does, in this process: another one would import Prefect and all flows once more."""
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        _shared_tls_contexts(),
    ):
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(_deployments_to_register(client)))
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


def _make_automation(client: SyncPrefectClient, content: dict[str, Any]) -> None:
    automation = AutomationCore.model_validate(content)
    found = client.read_automations_by_name(automation.name)
    if not found:
        client.create_automation(automation)
        return
    automation = automation.model_copy(update={"enabled": found[0].enabled})
    if found[0].model_dump(exclude={"id"}) != automation.model_dump():
        client.update_automation(found[0].id, automation)


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOYMENTS_FOLDER / name).read_text())
    return content
