"""Registers work pools, deployments and automations with a Prefect server; again and again, it changes nothing."""

import contextlib
import io
import json
import ssl
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml
from prefect.cli import app as prefect_command
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists

from deme_core.errors import DemeError

DEPLOYMENTS_FOLDER = Path(__file__).resolve().parent.parent / "deployments"
POOLS = {
    "deme-cpu": "Flows, and the work of recipes that need no GPU.",
    "deme-gpu": "Machines with GPUs.",
}
PoolType = Literal["process", "docker", "kubernetes"]


def import_flows() -> None:
    """Imports every flow that is deployed; `deploy` would do it later."""
    for deployment in _read("prefect.yaml")["deployments"]:
        import_module(deployment["entrypoint"].rpartition(".")[0])


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
    if name == "deme-gpu" and pool_type == "kubernetes":
        template["variables"]["properties"]["gpu_limit"]["default"] = 1
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
    if (found.base_job_template, found.description) != (template, description):
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template, description=description))


def _register_deployments() -> None:
    """Does what `prefect deploy` does, in this process: another one would import Prefect and all flows once more."""
    arguments = ["--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS_FOLDER / "prefect.yaml")]
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        _command_line("prefect", *arguments),
        _shared_tls_contexts(),
    ):
        try:
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
    elif found[0].model_dump(exclude={"id"}) != automation.model_dump():
        client.update_automation(found[0].id, automation)


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOYMENTS_FOLDER / name).read_text())
    return content
