"""The credentials of the local stack: made once, readable by their owner alone."""

import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deme_core.errors import InputError
from deme_core.local_files import local_errors

CREDENTIALS_NAME = "credentials.json"


@dataclass(frozen=True)
class Credentials:
    """What the S3 server and the Prefect server ask for.

    Attributes:
        access_key: of the one S3 identity.
        secret_key: of it, too.
        prefect_password: without it any web page in a browser of this machine could have the workers run its commands.
    """

    access_key: str = field(default_factory=lambda: f"deme-{secrets.token_hex(6)}")
    secret_key: str = field(default_factory=lambda: secrets.token_hex(24))
    prefect_password: str = field(default_factory=lambda: secrets.token_hex(24))

    def __repr__(self) -> str:
        return "Credentials(…)"  # Never in a log.

    @property
    def prefect_auth(self) -> str:
        """What Prefect calls an auth string; its UI asks for it, too."""
        return f"deme:{self.prefect_password}"


def load_credentials(path: Path) -> Credentials:
    """Returns the credentials kept in ``path``, which is made, with mode 0600, when it is not there.

    What an older file lacks is made and added.

    Raises:
        InputError: the file is no such file.
    """
    with local_errors(path):
        kept = path.read_text() if path.exists() else "{}"
        try:
            known = json.loads(kept)
            credentials = Credentials(**known)
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} holds no credentials of a stack; delete it, and new ones are made.") from error
        if known != asdict(credentials):
            write_private(path, json.dumps(asdict(credentials)))
        return credentials


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)
