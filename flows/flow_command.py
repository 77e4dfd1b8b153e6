"""A flow as a command: what is wrong is said at once, and all that takes seconds to start does so side by side."""

import os
from contextlib import ExitStack
from importlib import import_module
from typing import Any

from rich.console import Console

from deme_core.recipe_file import load_recipe
from deme_core.settings import Settings
from deme_core.store import check_access, open_store
from flows.ending import leave_in_time_after_interrupt
from flows.environment import make_folders
from flows.temporary_server import TemporaryServer
from tasks.health import check_api_address, check_health


def run_flow(
    path: str, recipe: str, overrides: list[str] | None, *, verbose: bool, **parameters: str
) -> dict[str, Any]:
    """Runs a flow in this process, showing its progress.

    Args:
        path: module and name of the flow, such as ``flows.pretrain:pretrain``.
        recipe: name of a recipe, or path or object-store URI of a YAML file.
        overrides: settings such as ``finetune.num_steps=50``.
        verbose: whether to show the logs of the flow and its workers.
        **parameters: others of the flow.

    Returns:
        What the flow returns.

    Raises:
        DemeError: recipe, store, tracking or a named server cannot be used, or the run fails.
    """
    loaded_recipe = load_recipe(recipe, overrides or [])
    check_access(open_store(Settings().store_uri))
    if address := os.environ.get("PREFECT_API_URL"):
        check_api_address(address)
        check_health("PREFECT_API_URL", address)
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    make_folders()  # Before Prefect is imported, which wants its own.
    server = None if address else TemporaryServer()
    console = Console(stderr=True)
    with ExitStack() as stack:
        with console.status("Starting"):
            module, name = path.split(":")
            flow = getattr(import_module(module), name)
            from flows.flow_runtime import workers_ahead
            from flows.progress_display import ProgressDisplay

            if server:
                stack.enter_context(workers_ahead(loaded_recipe))
                server.connect()
        leave_in_time_after_interrupt()
        with ProgressDisplay(console):
            result: dict[str, Any] = flow(recipe=recipe, overrides=overrides or [], **parameters)
    return result
