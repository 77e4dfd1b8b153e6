"""Empty databases: copied once, never over one that is in use."""

from pathlib import Path

import pytest

from tasks import databases
from tasks.databases import start_from_copy


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation that has made a database for the installed MLflow and none for Prefect."""
    folder = tmp_path / "installation"
    folder.mkdir()
    monkeypatch.setattr(databases, "_KEPT", folder)
    databases._made("mlflow").write_bytes(b"empty and up to date")
    return folder


def test_a_new_database_begins_as_the_copy(kept: Path, tmp_path: Path) -> None:
    path = tmp_path / "stack" / "mlflow.db"
    start_from_copy("mlflow", path)
    assert path.read_bytes() == b"empty and up to date"
    assert list(path.parent.iterdir()) == [path]


def test_a_database_in_use_is_left_alone(kept: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"runs")
    start_from_copy("mlflow", path)
    assert path.read_bytes() == b"runs"


def test_without_a_copy_of_this_version_the_server_makes_its_own(kept: Path, tmp_path: Path) -> None:
    (kept / "prefect-0.1.db").write_bytes(b"of another version")
    path = tmp_path / "prefect" / "prefect.db"
    start_from_copy("prefect", path)
    assert not path.exists()
    assert path.parent.is_dir()
