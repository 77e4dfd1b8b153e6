"""Environment defaults: state under DEME_HOME, no telemetry, no connection nobody asked for."""

import os
from pathlib import Path

from deme_core.local_files import local_errors
from deme_core.settings import Settings
from tasks.databases import start_from_copy

QUIET = {
    "DO_NOT_TRACK": "1",
    "GIT_PYTHON_REFRESH": "quiet",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow's files are small and go through its server: the object store behind it may have another name for us.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    # A server that is away is waited for by us (`tasks.patient_client`): MLflow's own waits double up to two minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # A two-core machine that is busy takes longer than the default 20 seconds.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    # Else Ray hides no GPU from jobs that reserved none, and says at every start that this will change.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def set_defaults() -> None:
    """Sets what the environment does not set already."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_HOME", str(Settings().state_folder / "prefect"))


def make_folders() -> None:
    """Makes the folder whose absence would stop a local Prefect server, and its database where it will need one."""
    home = Path(os.environ["PREFECT_HOME"])
    with local_errors(Settings().state_folder):
        home.mkdir(parents=True, exist_ok=True)
    if not any(os.environ.get(name) for name in ("PREFECT_API_URL", "PREFECT_API_DATABASE_CONNECTION_URL")):
        start_from_copy("prefect", home / "prefect.db")
