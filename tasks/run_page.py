"""The page of a run, wherever the run was done.

Prefect is not imported here: `deme report` answers at once.
"""

import tempfile
from pathlib import Path

from deme_core.artifacts import ArtifactStore, fetch_or_withdraw
from deme_core.local_files import local_errors, temporary_beside
from deme_core.manifest import ArtifactRef
from deme_core.settings import Settings
from deme_core.store import open_store
from tasks.tracked_runs import check_tracking, download, find_page

# The artifact is <store>/<REPORT_STAGE>/<MLflow run>; the page is a file of it, and of the MLflow run.
REPORT_STAGE, PAGE_NAME = "report", "report.html"


def samples_file(row: str) -> str:
    """Returns the name of a row's sample grid; in no folder, since MLflow compares only files that lie in none."""
    return f"samples_{row}.png"


def fetch_page(run: str | None) -> Path:
    """Returns the page of a run, fetched from MLflow, or else from the object store, if it was not made here.

    Args:
        run: id of an MLflow run, or its beginning; None for the newest run with a page.

    Raises:
        InputError: there is no such run, more than one, or it has no page.
    """
    settings = Settings()
    check_tracking(settings)
    run_id, uri = find_page(settings, run)
    path = settings.state_folder / "reports" / run_id / PAGE_NAME
    if not path.exists():
        _fetch(settings, run_id, uri, path)
    return path


def _fetch(settings: Settings, run_id: str, uri: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, local_errors(path), temporary_beside(path) as temporary:
        found = download(settings, run_id, PAGE_NAME, Path(folder)) or _from_store(settings, uri)
        temporary.write_bytes(found.read_bytes())
        temporary.rename(path)


def _from_store(settings: Settings, uri: str) -> Path:
    store_uri, _, digest = uri.rpartition(f"/{REPORT_STAGE}/")
    artifacts = ArtifactStore(open_store(store_uri), settings.cache_folder)
    return fetch_or_withdraw(artifacts, ArtifactRef(uri, digest)) / PAGE_NAME
