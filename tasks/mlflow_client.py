"""MLflow's client, for the modules that talk to it: `tasks.tracking`, `tasks.tracked_runs`, `tasks.registry`."""

import logging
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from deme_core.errors import InputError
from deme_core.settings import HTTP, Settings
from tasks.health import check_health

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DATABASE = re.compile(r"(postgresql|mysql|mssql)(\+[a-z0-9]+)?://.*", re.DOTALL)
_SQLITE = re.compile(r"sqlite(\+[a-z0-9]+)?:///.*", re.DOTALL)
_FOLDER = re.compile(r"file:.*|[./].*|[^:@]*", re.DOTALL)
# The migrations of a new SQLite database are of no interest to anyone.
for _name in ("alembic", "mlflow"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def import_mlflow() -> None:
    """Imports MLflow, before somebody waits for it."""
    import mlflow  # noqa: F401


def check_address(settings: Settings) -> None:
    """Raises InputError for addresses that would get into messages and reports with the password that they may hold.

    These are a server's with a password or a query, and any that MLflow or SQLAlchemy cannot read, which they then
    repeat. And for an address of MLflow's pages with a password, or that no browser could open.
    """
    uri, ui = settings.tracking_uri, settings.mlflow_ui_override
    if settings.has_tracking_server and ("@" in uri or "?" in uri):
        raise InputError(
            "MLFLOW_TRACKING_URI must hold no password and no query; use MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        )
    is_local = _SQLITE.fullmatch(uri) or _FOLDER.fullmatch(uri)
    if not (settings.has_tracking_server or is_local or (_DATABASE.fullmatch(uri) and _is_readable(uri))):
        raise InputError(
            "MLFLOW_TRACKING_URI must be a whole address that begins with http://, https://, sqlite:///, "
            "postgresql://, mysql:// or mssql://."
        )
    if ui and re.match(r"[^/]*//[^/]*@", ui):
        raise InputError("DEME_MLFLOW_UI_URL must hold no password, since pages link to it.")
    if ui and not ui.startswith(HTTP):
        raise InputError("DEME_MLFLOW_UI_URL must be a whole address that begins with http:// or https://.")


def is_database(uri: str) -> bool:
    """Returns whether a tracking URI that `check_address` allows names a database, which is read without a server."""
    return bool(_SQLITE.fullmatch(uri) or _DATABASE.fullmatch(uri))


def _is_readable(uri: str) -> bool:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(uri)
    except (ArgumentError, ValueError):
        return False
    return True


def check_server(settings: Settings) -> None:
    """Raises InputError, within some ten seconds, if no MLflow answers at the address of a tracking server."""
    address = settings.tracking_uri
    # A hosted server may have no page of health: it is asked as MLflow is. So is all that says anything else there.
    if check_health("MLFLOW_TRACKING_URI", address) == "OK":
        return
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    path, question = "/api/2.0/mlflow/experiments/search", {"max_results": 1}
    try:
        answer = http_request(
            get_default_host_creds(address),
            path,
            "POST",
            json=question,
            timeout=10,
            max_retries=0,
            raise_on_status=False,
        )
    except MlflowException as error:
        raise InputError(f"MLFLOW_TRACKING_URI {address} does not answer as an MLflow server ({error}).") from error
    if _is_of_mlflow(answer):
        return
    if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise InputError(
            f"MLFLOW_TRACKING_URI {address} wants a log-in (status {answer.status_code}): MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        )
    server = answer.headers.get("Server", "unnamed")
    raise InputError(
        f"MLFLOW_TRACKING_URI {address} is not the address of an MLflow server: for {path} the server there ({server}) "
        f"answers with status {answer.status_code}; correct it, or unset the variable."
    )


def _is_of_mlflow(answer: Any) -> bool:
    """Whether a response is MLflow's: an object, of an error with MLflow's code for it."""
    try:
        content = answer.json()
    except ValueError:
        return False
    return isinstance(content, dict) and (bool(answer.ok) or "error_code" in content)


def mlflow_client(settings: Settings) -> "MlflowClient":
    """Returns the client of this environment's tracking server or database; MLflow takes a second to import.

    Raises:
        InputError: as `check_address`.
    """
    check_address(settings)
    from mlflow import MlflowClient

    return MlflowClient(settings.tracking_uri)
