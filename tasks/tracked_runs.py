"""Runs that MLflow knows: found by the beginning of their id, with what they left behind."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_core.errors import InputError
from deme_core.settings import Settings
from tasks.mlflow_client import check_address, check_server, mlflow_client
from tasks.tracking import FLOW_RUN_TAG

if TYPE_CHECKING:
    from mlflow.entities import Run

# Tags of runs that found something: of all, of those with a merged model, and of those with a page.
_SCORED, _MERGED, REPORT_TAG = "deme.fingerprint", "deme.merged.uri", "deme.report.uri"
# Of runs that evaluated a model, and of parts of a run, such as its trainings.
_EVALUATED, _PARENT = "deme.model", "mlflow.parentRunId"


def find_tag(settings: Settings, tag: str, run: str | None) -> str:
    """Returns a tag of the run whose id begins with ``run``; by default of the newest run that has the tag.

    Raises:
        InputError: there is no such run, more than one, or it lacks the tag; or MLflow does not answer.
    """
    check_tracking(settings)
    return str(_find_run(settings, _has(tag), run).data.tags[tag])


def find_report(settings: Settings, *, run: str | None = None, flow_run: str | None = None) -> dict[str, Any]:
    """Returns the report of the run whose id begins with ``run``, of a flow run, or of the newest whole run.

    Raises:
        InputError: there is no such run, more than one, or it ended before its report was written.
    """
    newest = _has(_MERGED if run is None else _SCORED)
    query = f"tags.`{FLOW_RUN_TAG}` = '{flow_run}'" if flow_run else newest
    found = _find_run(settings, query, run)
    with tempfile.TemporaryDirectory() as folder:
        path = download(settings, found.info.run_id, "report.json", Path(folder))
        if path is None:
            raise InputError(
                f"Run {found.info.run_id} has no report: it ended before that was written, or MLflow's files cannot be "
                "reached; run it again, which computes nothing that the object store still has."
            )
        report: dict[str, Any] = json.loads(path.read_text())
    return report


def find_page(settings: Settings, run: str | None) -> tuple[str, str]:
    """Returns the id of the run whose id begins with ``run``, by default of the newest with a page, and its page's URI.

    Raises:
        InputError: there is no such run, more than one, or it has no page.
    """
    found = _find_run(settings, _has(REPORT_TAG if run is None else _SCORED), run)
    if REPORT_TAG not in found.data.tags:
        raise InputError(
            f"Run {found.info.run_id} has no page: it was made before there were any; run it again, which computes "
            "nothing that the object store still has."
        )
    return str(found.info.run_id), str(found.data.tags[REPORT_TAG])


def download(settings: Settings, run_id: str, name: str, folder: Path) -> Path | None:
    """Copies a file of a run into ``folder`` and returns its path; None if the run does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        return Path(mlflow_client(settings).download_artifacts(run_id, name, str(folder)))
    except (MlflowException, OSError):  # A server says the former, a folder the latter.
        return None


def _has(tag: str) -> str:
    return f"tags.`{tag}` != ''"


def _find_run(settings: Settings, query: str, run: str | None) -> "Run":
    found = _search(settings, query, run)
    unfit = [] if found or not run else _search(settings, "", run)
    if not found and not unfit:
        which = f"whose id begins with '{run}'" if run else "that has finished"
        raise InputError(f"There is no run {which} in {settings.tracking_place}; `deme run` makes one.")
    if run is not None and len(found or unfit) > 1:
        raise InputError(f"{len(found or unfit)} runs have an id that begins with '{run}'; give more of it.")
    if unfit:
        raise InputError(f"Run {unfit[0].info.run_id} {_shortcoming(unfit[0])}.")
    return found[0]


def _search(settings: Settings, query: str, run: str | None) -> "list[Run]":
    """Returns the runs that the query finds, newest first, whose id begins with ``run``."""
    client = mlflow_client(settings)
    experiments = [str(experiment.experiment_id) for experiment in client.search_experiments()]
    found = client.search_runs(experiments, query, order_by=["attributes.start_time DESC"], max_results=1000)
    return [candidate for candidate in found if candidate.info.run_id.startswith(run or "")]


def _shortcoming(run: "Run") -> str:
    """Returns why a run is none that was looked for, and what to do."""
    tags = run.data.tags
    if _PARENT in tags:
        return f"is a part of run {tags[_PARENT]}; give the id of that one"
    if _EVALUATED in tags:
        return "evaluated a model and made none; give the id of a run that `deme run` made"
    if _MERGED in tags:
        return "has no distilled model, since its recipe does not distill; leave out --row distilled"
    if run.info.status == "FINISHED":
        return "made a pretrained model and no more; give the id of a run that `deme run` made"
    return "has not finished; wait for it, or run the same command again if it was interrupted or failed"


def check_tracking(settings: Settings) -> None:
    """Raises InputError, in seconds, if no MLflow answers at a server's address; a database is asked nothing."""
    check_address(settings)
    if settings.has_tracking_server:
        check_server(settings)
