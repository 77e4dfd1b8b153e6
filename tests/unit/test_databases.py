"""Empty databases: copied once, never over one that is in use."""

import contextlib
import sqlite3
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


def test_what_make_install_made_of_prefect_is_filled_and_holds_nothing_of_its_own() -> None:
    made = databases._made("prefect")
    if not made.exists():
        pytest.skip("`make install` has made no database of this Prefect")
    with contextlib.closing(sqlite3.connect(f"file:{made}?mode=ro&immutable=1", uri=True)) as connection:
        filled = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if connection.execute(f'SELECT count(*) FROM "{name}"').fetchone() != (0,)
        ]
    # No keys, no sessions, no runs.
    assert sorted(filled) == ["alembic_version", "block_schema", "block_schema_reference", "block_type"]
