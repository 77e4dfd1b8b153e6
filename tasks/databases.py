"""Empty SQLite databases of Prefect and MLflow, made once per installation and copied from then on.

Each server brings a new database up to date by some hundred migrations, which together take as long as starting both,
and Prefect fills its own. `make install` (``python -m tasks.databases``) has that done by the servers' own commands; a
new database then begins as a copy. Where there is none of the installed version, the servers migrate as ever.
"""

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Literal

import httpx

from deme_core.local_files import local_errors, temporary_beside

Server = Literal["prefect", "mlflow"]

_KEPT = Path(sys.prefix) / "share" / "deme"
_SECONDS_TO_START = 300.0


def start_from_copy(server: Server, path: Path) -> None:
    """Puts an up-to-date, empty database at ``path``, unless one is there, or none was made for this version.

    Its folder is made in any case.
    """
    with local_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    made = _made(server)
    if path.exists() or not made.exists():
        return
    with local_errors(path), temporary_beside(path) as temporary:
        shutil.copyfile(made, temporary)
        with contextlib.suppress(FileExistsError):  # Another process was first.
            os.link(temporary, path)


def make_databases() -> None:
    """Makes the databases of the installed versions, unless they are there.

    Raises:
        SystemExit: a server's command fails; with what it said.
    """
    makers: dict[Server, Callable[[Path], None]] = {"prefect": _start_prefect_once, "mlflow": _migrate_mlflow}
    missing = {server: make for server, make in makers.items() if not _made(server).exists()}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
        paths = {server: Path(folder) / server / f"{server}.db" for server in missing}
        for path in paths.values():
            path.parent.mkdir()
        list(threads.map(lambda server: missing[server](paths[server]), missing))
        for server, path in paths.items():
            with temporary_beside(_made(server)) as temporary:
                shutil.copyfile(path, temporary)
                temporary.replace(_made(server))


def _made(server: Server) -> Path:
    return _KEPT / f"{server}-{version(server)}.db"


def _start_prefect_once(path: Path) -> None:
    """Starts a server until it answers: besides migrating it registers its types of blocks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    database = {"PREFECT_HOME": str(path.parent), "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{path}"}
    log = path.with_suffix(".log")
    with log.open("wb") as output:
        server = _start(["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)], database, output)
    try:
        deadline = time.monotonic() + _SECONDS_TO_START
        while not _answers(f"http://127.0.0.1:{port}/api/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"A database could not be made: {log.read_text(errors='replace')}")
            time.sleep(0.1)
    finally:
        server.terminate()
        server.wait()
    with contextlib.closing(sqlite3.connect(path)) as connection:  # All of it into the one file that is copied.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _migrate_mlflow(path: Path) -> None:
    migration = _start(["mlflow", "db", "upgrade", f"sqlite:///{path}"], {}, subprocess.PIPE)
    said, _ = migration.communicate()
    if migration.returncode != 0:
        raise SystemExit(f"A database could not be made: {said.decode(errors='replace')}")


def _start(arguments: Sequence[str], variables: Mapping[str, str], output: int | BinaryIO) -> "subprocess.Popen[bytes]":
    """Starts a server's own command; nothing that the environment says may point at a database in use."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    quiet = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *arguments],
        env={**kept, **quiet, **variables},
        stdout=output,
        stderr=subprocess.STDOUT,
    )


if __name__ == "__main__":
    make_databases()
