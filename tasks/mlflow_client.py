"""MLflow's client, for the modules that talk to it: `tasks.tracking`, `tasks.tracked_runs`, `tasks.registry`."""

import logging
from typing import TYPE_CHECKING

from deme_core.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

# The migrations of a new SQLite database are of no interest to anyone.
for _name in ("alembic", "mlflow"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def mlflow_client(settings: Settings) -> "MlflowClient":
    """Returns the client of this environment's tracking server or database; MLflow takes a second to import."""
    from mlflow import MlflowClient

    return MlflowClient(settings.tracking_uri)
