"""``deme doctor``: is this machine, with these settings, fit for a run, and is all at hand that a recipe needs?"""

import os
import platform
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from deme_core.errors import DemeError, InputError
from deme_core.recipe import Recipe
from deme_core.settings import Settings
from deme_core.store import check_access, open_store
from flows.terminal import say
from tasks.slots import count_cores, visible_gpus

_PACKAGES = ("torch", "diffusers", "accelerate", "prefect", "mlflow", "clean-fid")
_GB = 10**9


def examine(console: Console, recipe: Recipe | None = None) -> int:
    """Prints one line per check.

    Args:
        console: where to.
        recipe: also look for all that it needs, and estimate what it takes.

    Returns:
        The exit code: 0 if all passed, otherwise that of the worst failure, 2 for what the user can mend.
    """
    settings = Settings()
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", platform.python_version),
        ("packages", lambda: ", ".join(f"{name} {version(name)}" for name in _PACKAGES)),
        ("devices", _devices),
        ("DEME_HOME", lambda: _home(settings)),
        ("object store", lambda: _store(settings)),
        ("MLflow", lambda: _mlflow(settings)),
        ("Prefect", _prefect),
    ]
    code = run_checks(console, checks)
    if recipe is None:
        return code
    from flows.recipe_checks import RecipeChecks

    return max(code, run_checks(console, RecipeChecks(recipe, settings)))


def run_checks(console: Console, checks: Iterable[tuple[str, Callable[[], str]]]) -> int:
    """Prints one line per check, each done before the next is asked for; returns the exit code of the worst failure."""
    return max([_exit_code(console, name, check) for name, check in checks], default=0)


def _exit_code(console: Console, name: str, check: Callable[[], str]) -> int:
    try:
        mark, finding, code = "[green]ok[/]  ", check(), 0
    except DemeError as error:
        mark, finding, code = "[red]FAIL[/]", str(error), error.exit_code
    console.print(f"{mark} {name:<13}", end="", highlight=False)
    say(console, finding)
    return code


def _devices() -> str:
    cores = f"{count_cores()} CPU cores"
    gpus = visible_gpus()
    return f"{len(gpus)} GPUs ({', '.join(gpus)}), {cores}" if gpus else f"no GPU, {cores}"


def _home(settings: Settings) -> str:
    folder = settings.state_folder
    existing = existing_part(folder)
    if not os.access(existing, os.W_OK):
        raise InputError(f"{folder} cannot be written; point DEME_HOME elsewhere.")
    return f"{folder}, {shutil.disk_usage(existing).free / _GB:.0f} GB free"


def existing_part(folder: Path) -> Path:
    """Returns the folder, or, where it is still to be made, the nearest one above it."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _store(settings: Settings) -> str:
    check_access(open_store(settings.store_uri))
    return f"{settings.store_uri} can be written and read"


def _mlflow(settings: Settings) -> str:
    from tasks.tracked_runs import check_tracking

    check_tracking(settings)
    return settings.tracking_place


def _prefect() -> str:
    address = os.environ.get("PREFECT_API_URL")
    if not address:
        return "no PREFECT_API_URL: each run starts a temporary server"
    from tasks.health import check_api_address, check_health

    check_api_address(address)
    check_health("PREFECT_API_URL", address)
    return address
