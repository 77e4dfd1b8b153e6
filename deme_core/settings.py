"""Secrets, endpoints and folders: all that comes from the environment and none that changes a result."""

import re
from contextlib import suppress
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from deme_core.errors import InputError

HTTP = ("http://", "https://")
# Spot instances give 30 seconds between SIGTERM and SIGKILL, as Kubernetes and Prefect do.
_STOP_SECONDS = 25.0
_MOST_STOP_SECONDS = 86_400.0


class Settings(BaseSettings):
    """The environment of a run. AWS_* credentials are read by boto3 itself."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    home: Path = Field(Path(".deme"), alias="DEME_HOME")
    store_uri_override: str | None = Field(None, alias="DEME_STORE_URI")
    tracking_uri_override: str | None = Field(None, alias="MLFLOW_TRACKING_URI")
    mlflow_ui_override: str | None = Field(None, alias="DEME_MLFLOW_UI_URL")
    stop_seconds_override: str | None = Field(None, alias="DEME_STOP_SECONDS")

    @property
    def state_folder(self) -> Path:
        """Absolute folder of all local state."""
        return self.home.expanduser().resolve()

    @property
    def cache_folder(self) -> Path:
        """Verified copies of artifacts; may be deleted at any time."""
        return self.state_folder / "cache"

    @property
    def store_uri(self) -> str:
        """URI of the object store, ``file://…`` or ``s3://bucket/prefix``."""
        return self.store_uri_override or (self.state_folder / "store").as_uri()

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking URI."""
        return self.tracking_uri_override or f"sqlite:///{self.state_folder / 'mlflow.db'}"

    @property
    def tracking_place(self) -> str:
        """The same for messages: of a database or server scheme, host and name, for all else may be a password."""
        uri = self.tracking_uri
        if "://" not in uri or uri.startswith("file:") or re.match(r"sqlite[^:]*:///", uri):
            return uri
        scheme, _, rest = uri.partition("://")
        address, _, query = rest.partition("?")
        # Either sign may be of a password that is not escaped.
        return f"{scheme}://" + ("…" if "@" in query else address.rpartition("@")[2])

    @property
    def has_tracking_server(self) -> bool:
        """Whether MLflow is a server, which may be away, rather than a database or folder."""
        return self.tracking_uri.startswith(HTTP)

    @property
    def mlflow_ui_url(self) -> str | None:
        """Where people's browsers find MLflow, which may differ from where workers do; None if nobody serves it."""
        url = self.mlflow_ui_override or (self.tracking_uri if self.has_tracking_server else None)
        return url.rstrip("/") if url else None

    @property
    def stop_seconds(self) -> float:
        """How long a training that is told to leave may take for its last checkpoint, in seconds.

        Raises:
            InputError: it is no such number.
        """
        with suppress(ValueError):
            if 0 < (seconds := float(self.stop_seconds_override or _STOP_SECONDS)) <= _MOST_STOP_SECONDS:
                return seconds
        raise InputError(
            f"DEME_STOP_SECONDS is {self.stop_seconds_override}; set it to a number of seconds above 0, at most "
            f"{_MOST_STOP_SECONDS:.0f}."
        )
