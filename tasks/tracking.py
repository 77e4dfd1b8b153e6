"""Tracking in MLflow: what a flow run writes there.

Every call names its run explicitly, so parallel tasks never mix. Big weights stay in the object store.
"""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow import Image
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE, MLFLOW_SOURCE_NAME

from deme_core.settings import Settings
from tasks.mlflow_client import mlflow_client

_LONGEST_VALUE = 6000
_METRICS_PER_CALL = 1000

# Names of training metrics as they appear in MLflow.
_TRAINING_METRICS = {
    "diffusion_loss": "loss/diffusion",
    "consistency_loss": "loss/consistency",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
    "images_per_sec": "images_per_sec",
    "gpu_memory_gb": "gpu_memory_gb",
}


class Tracker:
    """The MLflow runs of one flow run: a parent and its children."""

    def __init__(self, settings: Settings, *, experiment: str, run_name: str) -> None:
        # A run id in the environment would beat the explicit ones.
        os.environ.pop("MLFLOW_RUN_ID", None)
        if settings.tracking_uri.startswith("sqlite:"):
            settings.state_folder.mkdir(parents=True, exist_ok=True)
        self._client, self._ui_url = mlflow_client(settings), settings.mlflow_ui_url
        self._experiment_id = self._find_experiment(settings, experiment)
        self.run_id = self._create_run(run_name, {})
        # A person who sees the run in MLflow knows then what to give to `deme report`, `compare` and `export`.
        self._client.update_run(self.run_id, name=f"{run_name}-{self.run_id[:8]}")

    def _find_experiment(self, settings: Settings, name: str) -> str:
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        local = settings.tracking_uri.startswith("sqlite:")
        location = (settings.state_folder / "mlartifacts").as_uri() if local else None
        return str(self._client.create_experiment(name, artifact_location=location))

    def _create_run(self, name: str, tags: Mapping[str, str]) -> str:
        named = {MLFLOW_RUN_NAME: name, MLFLOW_SOURCE_NAME: "deme", **tags}
        run: Run = self._client.create_run(self._experiment_id, tags=named, run_name=name)
        return str(run.info.run_id)

    def child(self, name: str) -> str:
        """Starts a child run and returns its id."""
        return self._create_run(name, {MLFLOW_PARENT_RUN_ID: self.run_id})

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Logs settings."""
        entries = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in params.items()]
        for start in range(0, len(entries), 100):
            self._client.log_batch(run_id, params=entries[start : start + 100])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Logs numbers at one step."""
        now = int(time.time() * 1000)
        self._log(run_id, [Metric(name, float(value), now, step) for name, value in metrics.items()])

    def log_training(self, run_id: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Logs training progress records, each at its optimizer step."""
        now = int(time.time() * 1000)
        self._log(
            run_id,
            [
                Metric(name, float(record[key]), now, int(record["global_step"]))
                for record in records
                for key, name in _TRAINING_METRICS.items()
            ],
        )

    def _log(self, run_id: str, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), _METRICS_PER_CALL):
            self._client.log_batch(run_id, metrics=metrics[start : start + _METRICS_PER_CALL])

    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Sets tags, all in one call."""
        self._client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def describe(self, run_id: str, text: str) -> None:
        """Sets what MLflow shows as the description of a run, on its page and as a column of the table of runs."""
        self.set_tags(run_id, {MLFLOW_RUN_NOTE: text})

    def log_file(self, run_id: str, path: Path) -> None:
        """Uploads a small file, e.g. a figure."""
        self._client.log_artifact(run_id, str(path))

    def log_image(self, run_id: str, path: Path, key: str) -> None:
        """Uploads a picture so that MLflow's charts show it beside those of other runs."""
        self._client.log_image(run_id, Image(str(path)), key=key, step=0)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Uploads a text."""
        self._client.log_text(run_id, text, name)

    def run_url(self) -> str | None:
        """Address of the parent run in MLflow's UI; None without a server."""
        if self._ui_url is None:
            return None
        return f"{self._ui_url}/#/experiments/{self._experiment_id}/runs/{self.run_id}"

    def file_url(self, name: str) -> str | None:
        """Address of a file of the parent run; None without a server."""
        return f"{self._ui_url}/get-artifact?path={name}&run_uuid={self.run_id}" if self._ui_url else None

    def finish(self, run_id: str, *, failed: bool = False) -> None:
        """Ends a run."""
        self._client.set_terminated(run_id, "FAILED" if failed else "FINISHED")
