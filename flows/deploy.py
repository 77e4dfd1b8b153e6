"""Registers work pools, deployments and automations with a Prefect server; again and again, it changes nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound

from deme_core.errors import DemeError

DEPLOYMENTS_FOLDER = Path(__file__).resolve().parent.parent / "deployments"
POOLS = {
    "deme-cpu": "Flows, and the work of recipes that need no GPU.",
    "deme-gpu": "Machines with GPUs.",
}
PoolType = Literal["process", "docker", "kubernetes"]


def deploy(pool_type: PoolType = "process") -> list[str]:
    """Makes the server of PREFECT_API_URL know everything DeMe offers.

    Args:
        pool_type: what the work pools start flow runs in.

    Returns:
        The deployments, as ``flow/deployment``.

    Raises:
        DemeError: the server refuses.
    """
    with get_client(sync_client=True) as client:
        for name, description in POOLS.items():
            _make_pool(client, name, description, pool_type)
        _register_deployments()
        for automation in _read("automations.yaml")["automations"]:
            _make_automation(client, automation)
        return sorted(
            f"{client.read_flow(found.flow_id).name}/{found.name}"
            for found in client.read_deployments()
            if "deme" in found.tags
        )


def _make_pool(client: SyncPrefectClient, name: str, description: str, pool_type: PoolType) -> None:
    template = json.loads((DEPLOYMENTS_FOLDER / "work_pools" / f"{pool_type}.json").read_text())
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(name=name, description=description, type=pool_type, base_job_template=template)
        )
        return
    if found.type != pool_type:
        raise DemeError(
            f"Work pool {name} is of type {found.type}, not {pool_type}; delete it first, or keep its type."
        )
    if found.base_job_template != template:
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


def _register_deployments() -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file"]
    done = subprocess.run(
        [*command, str(DEPLOYMENTS_FOLDER / "prefect.yaml")], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()][-5:]
        raise DemeError(f"prefect deploy failed: {' '.join(last)}")


def _make_automation(client: SyncPrefectClient, content: dict[str, Any]) -> None:
    automation = AutomationCore.model_validate(content)
    found = client.read_automations_by_name(automation.name)
    if not found:
        client.create_automation(automation)
    elif found[0].model_dump(exclude={"id"}) != automation.model_dump():
        client.update_automation(found[0].id, automation)


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOYMENTS_FOLDER / name).read_text())
    return content
