"""MLflow's client, for the modules that talk to it: `tasks.tracking`, `tasks.tracked_runs`, `tasks.registry`."""

import logging
from typing import TYPE_CHECKING

from deme_core.errors import InputError
from deme_core.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

# The migrations of a new SQLite database are of no interest to anyone.
for _name in ("alembic", "mlflow"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def import_mlflow() -> None:
    """Imports MLflow, before somebody waits for it."""
    import mlflow  # noqa: F401


def check_address(settings: Settings) -> None:
    """Raises InputError if the tracking server's URL holds a password, which would get into messages and reports."""
    if settings.tracking_uri.startswith("http") and "@" in settings.tracking_uri:
        raise InputError(
            "MLFLOW_TRACKING_URI must hold no password; use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )


def mlflow_client(settings: Settings) -> "MlflowClient":
    """Returns the client of this environment's tracking server or database; MLflow takes a second to import.

    Raises:
        InputError: as `check_address`.
    """
    check_address(settings)
    from mlflow import MlflowClient

    return MlflowClient(settings.tracking_uri)
