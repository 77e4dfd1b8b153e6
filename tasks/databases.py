"""Empty SQLite databases of Prefect and MLflow, made once per installation and copied from then on.

Each server brings a new database up to date by some hundred migrations, which together take as long as starting both.
`make install` (``python -m tasks.databases``) has them done by the servers' own commands; a new database then begins as
a copy. Where there is none of the installed version, the servers migrate as ever.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from deme_core.store import local_errors, temporary_beside

Server = Literal["prefect", "mlflow"]

_KEPT = Path(sys.prefix) / "share" / "deme"


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
        with suppress(FileExistsError):  # Another process was first.
            os.link(temporary, path)


def make_databases() -> None:
    """Makes the databases of the installed versions, unless they are there."""
    missing: list[Server] = [server for server in ("prefect", "mlflow") if not _made(server).exists()]
    with tempfile.TemporaryDirectory() as folder:
        paths = {server: Path(folder) / f"{server}.db" for server in missing}
        running = [_migrate(server, path) for server, path in paths.items()]
        for process in running:
            said, _ = process.communicate()
            if process.returncode != 0:
                raise SystemExit(f"A database could not be made: {said}")
        for server, path in paths.items():
            with temporary_beside(_made(server)) as temporary:
                shutil.copyfile(path, temporary)
                temporary.replace(_made(server))


def _made(server: Server) -> Path:
    return _KEPT / f"{server}-{version(server)}.db"


def _migrate(server: Server, path: Path) -> "subprocess.Popen[str]":
    """Starts the server's own command for a database at ``path``."""
    arguments = {
        "prefect": ["prefect", "server", "database", "upgrade", "--yes"],
        "mlflow": ["mlflow", "db", "upgrade", f"sqlite:///{path}"],
    }[server]
    # Nothing that the environment says may point at a database in use.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    ours = {"PREFECT_HOME": str(path.parent), "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{path}"}
    quiet = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=kept | ours | quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


if __name__ == "__main__":
    make_databases()
