"""Tracking in MLflow: what a flow run writes there.

Every call names its run explicitly, so parallel tasks never mix. Big weights stay in the object store. MLflow is
imported where it is first used: that takes a second, in which a flow's workers can be at work already.
"""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deme_core.settings import Settings
from tasks.databases import start_from_copy
from tasks.mlflow_client import is_database
from tasks.patient_client import patient_client

if TYPE_CHECKING:
    from mlflow.entities import Run

_LONGEST_VALUE = 6000
_METRICS_PER_CALL = 1000
FLOW_RUN_TAG = "deme.flow_run_id"

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

    def __init__(self, settings: Settings, *, experiment: str, run_name: str, flow_run_id: str) -> None:
        # A run id in the environment would beat the explicit ones.
        os.environ.pop("MLFLOW_RUN_ID", None)
        if settings.tracking_uri_override is None:
            start_from_copy("mlflow", settings.state_folder / "mlflow.db")
        self._client, self._ui_url = patient_client(settings), settings.mlflow_ui_url
        self._experiment_id = self._find_experiment(settings, experiment)
        self._flow_run_id = flow_run_id
        self.run_id = self._create_run(run_name, {FLOW_RUN_TAG: flow_run_id})
        # A person who sees the run in MLflow knows then what to give to `deme report`, `compare` and `export`.
        self._client.update_run(self.run_id, name=f"{run_name}-{self.run_id[:8]}")

    def _find_experiment(self, settings: Settings, name: str) -> str:
        if found := self._client.get_experiment_by_name(name):
            if found.lifecycle_stage == "deleted":  # By whoever tidied up; its name stays taken.
                self._client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        # A server or a folder has a place for files; with a database alone they would go to ./mlruns, wherever that is.
        lasting = (settings.state_folder / "mlartifacts").as_uri()
        location = lasting if is_database(settings.tracking_uri) else None
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.create_experiment(name, artifact_location=location))
        except MlflowException:
            # Another run of the recipe may have made it in between.
            if found := self._client.get_experiment_by_name(name):
                return str(found.experiment_id)
            raise

    def _create_run(self, name: str, tags: Mapping[str, str]) -> str:
        named = {"mlflow.runName": name, "mlflow.source.name": "deme", **tags}
        run: Run = self._client.create_run(self._experiment_id, tags=named, run_name=name)
        return str(run.info.run_id)

    def child(self, name: str) -> str:
        """Starts a child run and returns its id."""
        return self._create_run(name, {"mlflow.parentRunId": self.run_id})

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Logs settings."""
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in params.items()]
        for start in range(0, len(entries), 100):
            self._client.log_batch(run_id, params=entries[start : start + 100])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Logs numbers that have no steps."""
        self.log_steps(run_id, {0: metrics})

    def log_steps(self, run_id: str, metrics: Mapping[int, Mapping[str, float]]) -> None:
        """Logs numbers by step, a thousand in a call."""
        now = int(time.time() * 1000)
        points = [(name, float(value), step, now) for step, at in metrics.items() for name, value in at.items()]
        self._log(run_id, points)

    def log_training(self, run_id: str, records: Iterable[tuple[Mapping[str, Any], int]]) -> None:
        """Logs training progress records, each at its optimizer step.

        Args:
            run_id: the run.
            records: each with the time at which it came, in milliseconds since the epoch; what is logged again with
                the same time is there once.
        """
        points = [
            (name, float(record[key]), int(record["global_step"]), came)
            for record, came in records
            for key, name in _TRAINING_METRICS.items()
        ]
        self._log(run_id, points)

    def _log(self, run_id: str, points: list[tuple[str, float, int, int]]) -> None:
        """Logs (name, value, step, time)."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, came, step) for name, value, step, came in points]
        for start in range(0, len(metrics), _METRICS_PER_CALL):
            self._client.log_batch(run_id, metrics=metrics[start : start + _METRICS_PER_CALL])

    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Sets tags, all in one call."""
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def describe(self, run_id: str, text: str) -> None:
        """Sets what MLflow shows as the description of a run, on its page and as a column of the table of runs."""
        self.set_tags(run_id, {"mlflow.note.content": text})

    def log_file(self, run_id: str, path: Path) -> None:
        """Uploads a small file, e.g. a figure."""
        self._client.log_artifact(run_id, str(path))

    def log_image(self, run_id: str, path: Path, key: str) -> None:
        """Uploads a picture so that MLflow's charts show it beside those of other runs."""
        from mlflow import Image

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

    def finish(self, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Ends a run."""
        self._client.set_terminated(run_id, status)

    def finish_flow(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Ends the parent run, and what else of this flow run is still said to be running.

        That is what was at work when it failed, and runs whose creation was not answered, or begun before a restart.
        """
        self._client.set_terminated(self.run_id, status)
        self._end_rest([self.run_id], "FAILED" if status == "FAILED" else "KILLED")
        self.end_killed(self._flow_run_id)

    def end_killed(self, flow_run_id: str) -> None:
        """Ends the runs of a flow run whose process was killed, which nobody else will."""
        experiments = [str(found.experiment_id) for found in self._client.search_experiments()]
        query = f"tags.`{FLOW_RUN_TAG}` = '{flow_run_id}' and attributes.status = 'RUNNING'"
        killed = [run.info.run_id for run in self._client.search_runs(experiments, query)]
        for run_id in killed:
            self._client.set_terminated(run_id, "KILLED")
        self._end_rest(killed, "KILLED")

    def _end_rest(self, parents: Iterable[str], status: str) -> None:
        for parent in parents:
            experiment = self._client.get_run(parent).info.experiment_id
            query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
            for run in self._client.search_runs([experiment], query):
                self._client.set_terminated(run.info.run_id, status)
