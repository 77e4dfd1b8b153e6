"""The services of the local stack: how each is started, and when it is really ready.

All of them listen on loopback alone and send no telemetry.
"""

import hmac
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from deme_core.errors import InputError, StoreUnavailableError
from flows.environment import QUIET, proxy_exemptions
from flows.stack.credentials import CREDENTIALS_NAME, Credentials, load_credentials, write_private
from flows.stack.processes import STACK_VARIABLE
from tasks.databases import start_from_copy

HOST = "127.0.0.1"
CPU_POOL, GPU_POOL = "deme-cpu", "deme-gpu"
STORE_URI = "s3://deme/store"
_MLFLOW_BUCKET = "mlflow"
_FOREIGN = ("AWS_", "DEME_", "MLFLOW_", "PREFECT_")
# What a flow run and its watchers both must know, so that a killed one is noticed.
HEARTBEAT_SECONDS = 30


@dataclass(frozen=True)
class Service:
    """One process of the stack.

    Attributes:
        name: as users see it.
        url: where it answers; what it serves, for a worker.
        command: its command line; no secret is in it.
        environment: all of its environment.
        check: raises unless the service is ready; called again and again while it starts.
        prepare: makes the files that it needs; called before it is started.
    """

    name: str
    url: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    check: Callable[[], None]
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Layout:
    """Where everything of a stack lies, and how it is reached.

    Attributes:
        home: DEME_HOME, absolute.
        ports: port by name, see `flows.stack.ports`.
    """

    home: Path
    ports: Mapping[str, int]
    credentials: Credentials = field(init=False)

    def __post_init__(self) -> None:
        """Reads, or makes, the credentials."""
        object.__setattr__(self, "credentials", load_credentials(self.folder / CREDENTIALS_NAME))

    @property
    def folder(self) -> Path:
        """State of the stack."""
        return self.home / "stack"

    def url(self, name: str) -> str:
        """Address of a service."""
        return f"http://{HOST}:{self.ports[name]}"

    def client_environment(self) -> dict[str, str]:
        """Returns what points prefect, mlflow, aws and deme at this stack, and past a proxy that is named here."""
        return {
            "DEME_HOME": str(self.home),
            "DEME_STORE_URI": STORE_URI,
            "PREFECT_API_URL": f"{self.url('prefect')}/api",
            "PREFECT_API_AUTH_STRING": self.credentials.prefect_auth,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_S3_ENDPOINT_URL": self.url("s3"),
            "AWS_ENDPOINT_URL": self.url("s3"),
            "AWS_ACCESS_KEY_ID": self.credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            **proxy_exemptions(os.environ),
        }

    def environment(self) -> dict[str, str]:
        """Returns the environment of the services: this process's own, pointed at the stack."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return kept | QUIET | self.client_environment() | {STACK_VARIABLE: str(self.home), "PATH": binaries}


def s3(layout: Layout) -> Service:
    """The object store, with its buckets."""
    data, config = layout.folder / "s3", layout.folder / "s3.json"
    ports = {"s3": "s3", "master": "s3_master", "volume": "s3_volume", "filer": "s3_filer", "admin": "s3_admin"}
    return Service(
        name="s3",
        url=layout.url("s3"),
        command=(
            _binary("weed", layout),
            "-logtostderr=true",
            "mini",
            f"-dir={data}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            *(f"-{option}.port={layout.ports[name]}" for option, name in ports.items()),
            "-master.telemetry=false",
            # The S3 server speaks gRPC to the others, whose HTTP asks for no key: any web page could delete a bucket.
            "-disableHttp",
            "-webdav=false",
            "-admin.ui=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={config}",
            # A bucket that a misspelt URI names must be missed, not made.
            "-s3.autoCreateBucket=false",
            "-s3.allowDeleteBucketNotEmpty=false",
        ),
        environment=layout.environment() | _volume_keys(layout),
        check=lambda: _check_store(layout),
        prepare=lambda: _prepare_store(layout, data, config),
    )


def _volume_keys(layout: Layout) -> dict[str, str]:
    """Returns what lets nobody but the S3 server read and write pieces of objects, which go by HTTP nevertheless."""
    secret = layout.credentials.secret_key.encode()
    names = ("WEED_JWT_SIGNING_KEY", "WEED_JWT_SIGNING_READ_KEY")
    return {name: hmac.new(secret, name.encode(), "sha256").hexdigest() for name in names}


def _prepare_store(layout: Layout, data: Path, config: Path) -> None:
    data.mkdir(parents=True, exist_ok=True)
    keys = {"accessKey": layout.credentials.access_key, "secretKey": layout.credentials.secret_key}
    identity = {"name": "deme", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    write_private(config, json.dumps({"identities": [identity]}))


def _check_store(layout: Layout) -> None:
    from deme_core.s3_client import make_buckets

    _get(f"{layout.url('s3')}/healthz")  # First, since it costs next to nothing while the server is not up.
    make_buckets(
        ("deme", _MLFLOW_BUCKET),
        endpoint_url=layout.url("s3"),
        access_key=layout.credentials.access_key,
        secret_key=layout.credentials.secret_key,
    )


def prefect(layout: Layout) -> Service:
    """The Prefect server, on SQLite."""
    command = ("server", "start", "--host", HOST, "--port", str(layout.ports["prefect"]))
    return Service(
        name="prefect",
        url=layout.url("prefect"),
        command=(_binary("prefect", layout), *command),
        environment=layout.environment()
        | {
            "PREFECT_SERVER_API_AUTH_STRING": layout.credentials.prefect_auth,
            # Its pages ask at the first of these, wherever they were opened.
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{layout.url('prefect')},http://localhost:{layout.ports['prefect']}",
            # It writes its UI before it serves it: by default into the installed package, which all stacks share.
            "PREFECT_UI_STATIC_DIRECTORY": str(layout.folder / "prefect" / "ui"),
        },
        check=lambda: _get(f"{layout.url('prefect')}/api/health"),
        prepare=lambda: start_from_copy("prefect", layout.folder / "prefect" / "prefect.db"),
    )


def mlflow(layout: Layout) -> Service:
    """The MLflow server: SQLite, artifacts in S3."""
    command = ("server", "--host", HOST, "--port", str(layout.ports["mlflow"]), "--workers", "1")
    database = layout.folder / "mlflow.db"
    return Service(
        name="mlflow",
        url=layout.url("mlflow"),
        command=(
            _binary("mlflow", layout),
            *command,
            "--backend-store-uri",
            f"sqlite:///{database}",
            "--artifacts-destination",
            f"s3://{_MLFLOW_BUCKET}/artifacts",
        ),
        # The job runners are nine processes of 2 GB in all, for features that DeMe does not use.
        environment=layout.environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        check=lambda: _get(f"{layout.url('mlflow')}/health"),
        prepare=lambda: start_from_copy("mlflow", database),
    )


def worker(layout: Layout, pool: str = CPU_POOL, *, since: float = 0.0) -> Service:
    """A Prefect worker that runs flows as processes of this machine.

    Args:
        layout: the stack.
        pool: the work pool it serves.
        since: when it was started (epoch seconds): a heartbeat before that is another worker's.
    """
    from tasks.slots import visible_gpus

    name = f"local-{pool}"
    return Service(
        name="worker" if pool == CPU_POOL else "worker-gpu",
        url=f"work pool {pool}",
        command=(
            *(sys.executable, "-P", "-m", "flows.cli", "worker", pool, "--name", name),
            # A flow holds its place on the other pool while its jobs wait for theirs; here a job has a GPU.
            *(("--limit", str(len(visible_gpus()) or 1)) if pool == GPU_POOL else ()),
        ),
        # The default of ten seconds is felt at every start of a run.
        environment=layout.environment() | {"PREFECT_WORKER_QUERY_SECONDS": "1"},
        check=lambda: _find_worker(layout, pool, name, since),
    )


def _find_worker(layout: Layout, pool: str, name: str, since: float) -> None:
    for found in _post(layout, f"work_pools/{pool}/workers/filter", {}):
        beat = found.get("last_heartbeat_time")
        is_ours = found["name"] == name and found["status"] == "ONLINE"
        if is_ours and beat and datetime.fromisoformat(beat).timestamp() >= since:
            return
    raise StoreUnavailableError(f"Work pool {pool} has no worker {name} yet.")


def crash_beginning_runs(layout: Layout, pool: str) -> list[str]:
    """Calls the flow runs of a pool Crashed that are beginning or being cancelled; only while it has no worker here.

    Returns:
        Their names.
    """
    beginning = {"state": {"type": {"any_": ["PENDING", "CANCELLING"]}}}
    wanted = {"flow_runs": beginning, "work_pools": {"name": {"any_": [pool]}}}
    state = {"type": "CRASHED", "message": "Its worker was killed while it began, or was being cancelled."}
    found = _post(layout, "flow_runs/filter", wanted)
    for run in found:
        _post(layout, f"flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    return [str(run["name"]) for run in found]


def _post(layout: Layout, path: str, content: dict[str, Any]) -> Any:
    login = httpx.BasicAuth(*layout.credentials.prefect_auth.split(":"))
    return _http().post(f"{layout.url('prefect')}/api/{path}", json=content, auth=login).raise_for_status().json()


def _get(url: str) -> None:
    _http().get(url).raise_for_status()


@cache
def _http() -> httpx.Client:
    """One for all: each makes a TLS context, which takes longer than the requests. No proxy leads to loopback."""
    return httpx.Client(timeout=5, trust_env=False)


def _binary(name: str, layout: Layout) -> str:
    found = shutil.which(name, path=layout.environment()["PATH"])
    if found is None:
        raise InputError(f"There is no {name} command beside {sys.executable}; run `make install`.")
    return found
