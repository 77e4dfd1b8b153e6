"""The credentials of the local S3 server: made once, readable by their owner alone."""

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from deme_core.local_files import local_errors

CREDENTIALS_NAME = "credentials.json"


@dataclass(frozen=True)
class Credentials:
    """One S3 identity."""

    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return "Credentials(…)"  # Never in a log.


def load_credentials(path: Path) -> Credentials:
    """Returns the credentials kept in ``path``, which is made, with mode 0600, when it is not there."""
    with local_errors(path):
        if not path.exists():
            made = {"access_key": f"deme-{secrets.token_hex(6)}", "secret_key": secrets.token_hex(24)}
            write_private(path, json.dumps(made))
        return Credentials(**json.loads(path.read_text()))


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)
