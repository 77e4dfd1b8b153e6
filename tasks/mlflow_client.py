"""MLflow's client, for the modules that talk to it: `tasks.tracking`, `tasks.tracked_runs`, `tasks.registry`."""

import logging
import re
from typing import TYPE_CHECKING

from deme_core.errors import InputError
from deme_core.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SERVER = re.compile(r"https?://.*", re.DOTALL)
_DATABASE = re.compile(r"(postgresql|mysql|mssql)(\+[a-z0-9]+)?://.*", re.DOTALL)
_LOCAL = re.compile(r"sqlite(\+[a-z0-9]+)?:///.*|file:.*|[./].*|[^:@]*", re.DOTALL)
# The migrations of a new SQLite database are of no interest to anyone.
for _name in ("alembic", "mlflow"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def import_mlflow() -> None:
    """Imports MLflow, before somebody waits for it."""
    import mlflow  # noqa: F401


def check_address(settings: Settings) -> None:
    """Raises InputError for addresses that would get into messages and reports with the password that they may hold.

    These are a server's with a password, and any that MLflow or SQLAlchemy cannot read, which they then repeat.
    """
    uri = settings.tracking_uri
    if _SERVER.fullmatch(uri) and "@" in uri:
        raise InputError(
            "MLFLOW_TRACKING_URI must hold no password; use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
    if not (_SERVER.fullmatch(uri) or _LOCAL.fullmatch(uri) or (_DATABASE.fullmatch(uri) and _is_readable(uri))):
        raise InputError(
            "MLFLOW_TRACKING_URI must be a whole address that begins with http://, https://, sqlite:///, "
            "postgresql://, mysql:// or mssql://."
        )


def _is_readable(uri: str) -> bool:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(uri)
    except (ArgumentError, ValueError):
        return False
    return True


def mlflow_client(settings: Settings) -> "MlflowClient":
    """Returns the client of this environment's tracking server or database; MLflow takes a second to import.

    Raises:
        InputError: as `check_address`.
    """
    check_address(settings)
    from mlflow import MlflowClient

    return MlflowClient(settings.tracking_uri)
