"""Prefect flows and the command line: composition only."""

from flows.environment import set_defaults

# Prefect, MLflow and the hub client read the environment when they are imported.
set_defaults()
