"""MLflow's client, for the modules that talk to it: `tasks.tracking`, `tasks.tracked_runs`, `tasks.registry`."""

import logging

from mlflow import MlflowClient

from deme_core.settings import Settings

# The migrations of a new SQLite database are of no interest to anyone.
for _name in ("alembic", "mlflow"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def mlflow_client(settings: Settings) -> MlflowClient:
    """Returns the client of this environment's tracking server or database."""
    return MlflowClient(settings.tracking_uri)
