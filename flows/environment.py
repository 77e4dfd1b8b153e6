"""Environment defaults: state under DEME_HOME, no telemetry, no connection nobody asked for."""

import os
from collections.abc import Mapping
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
_LOOPBACK = ("127.0.0.1", "localhost")
_PROXIES, _EXEMPTIONS = ("http_proxy", "https_proxy", "all_proxy"), ("NO_PROXY", "no_proxy")


def set_defaults() -> None:
    """Sets what the environment does not set already."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_HOME", str(Settings().state_folder / "prefect"))


def proxy_exemptions(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what keeps clients from asking a proxy for this machine's own servers.

    Args:
        environment: may name a proxy, and what goes past it already.

    Returns:
        NO_PROXY and no_proxy, alike since clients differ in which they prefer; nothing if no proxy is named.
    """
    if not any(environment.get(name) or environment.get(name.upper()) for name in _PROXIES):
        return {}
    given = ",".join(environment.get(name, "") for name in _EXEMPTIONS).split(",")
    hosts = dict.fromkeys(host.strip() for host in given if host.strip())
    # An asterisk exempts all, but for urllib only where it stands alone.
    exempt = "*" if "*" in hosts else ",".join(hosts | dict.fromkeys(_LOOPBACK))
    return dict.fromkeys(_EXEMPTIONS, exempt)


def reach_loopback_without_proxy() -> None:
    """Has this process and those that it starts reach servers of this machine past any proxy."""
    os.environ.update(proxy_exemptions(os.environ))


def make_folders() -> None:
    """Makes the folder whose absence would stop a local Prefect server, and its database where it will need one."""
    home = Path(os.environ["PREFECT_HOME"])
    with local_errors(Settings().state_folder):
        home.mkdir(parents=True, exist_ok=True)
    if not any(os.environ.get(name) for name in ("PREFECT_API_URL", "PREFECT_API_DATABASE_CONNECTION_URL")):
        start_from_copy("prefect", home / "prefect.db")
