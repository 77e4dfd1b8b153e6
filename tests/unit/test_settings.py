from pathlib import Path

import pytest
from pydantic import ValidationError

from deme_core.errors import InputError
from deme_core.settings import Settings

NAMES = ("DEME_HOME", "DEME_STORE_URI", "MLFLOW_TRACKING_URI", "DEME_STOP_SECONDS")


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_everything_lies_in_the_working_folder_by_default(tmp_path: Path) -> None:
    settings = Settings()
    assert settings.state_folder == tmp_path / ".deme"
    assert settings.cache_folder == tmp_path / ".deme" / "cache"
    assert settings.store_uri == f"file://{tmp_path}/.deme/store"
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/.deme/mlflow.db"


def test_the_folder_stays_where_it_was_when_the_process_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_HOME", "state")
    assert Settings().state_folder == tmp_path / "state"
    monkeypatch.setenv("DEME_HOME", "~/state")
    assert Settings().state_folder == Path.home() / "state"


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_STORE_URI", "s3://bucket/prefix")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    settings = Settings()
    assert settings.store_uri == "s3://bucket/prefix"
    assert settings.tracking_uri == "http://127.0.0.1:5000"


@pytest.mark.parametrize("name", ["DEME_STORE_URI", "MLFLOW_TRACKING_URI"])
def test_an_empty_variable_is_no_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    default = Settings()
    monkeypatch.setenv(name, "")
    assert (Settings().store_uri, Settings().tracking_uri) == (default.store_uri, default.tracking_uri)


@pytest.mark.parametrize(("given", "seconds"), [(None, 25.0), ("", 25.0), ("600", 600.0), ("7.5", 7.5)])
def test_a_checkpoint_has_as_long_as_the_environment_gives_it(
    given: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is not None:
        monkeypatch.setenv("DEME_STOP_SECONDS", given)
    assert Settings().stop_seconds == seconds


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf", "1e300"])
def test_a_time_that_no_checkpoint_can_have_is_said(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_STOP_SECONDS", given)
    settings = Settings()
    with pytest.raises(InputError, match=rf"^DEME_STOP_SECONDS is {given}; set it to a number of seconds"):
        _ = settings.stop_seconds


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().home = Path("elsewhere")


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://deme:hush@db/mlflow",
        "postgresql://deme:hu/sh@db/mlflow",
        "postgresql://db/mlflow?user=deme&password=hush&sslmode=require",
    ],
)
def test_the_password_of_a_database_is_left_out_of_messages(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    place = Settings().tracking_place
    assert "hu" not in place
    assert place.startswith("postgresql://")
    assert "mlflow" in place


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3Dhush", "mssql+pyodbc:///"),
        ("mysql+pymysql://db:3306/mlflow?user=u&passwd=hush", "mysql+pymysql://db:3306/mlflow"),
        ("mysql+pymysql://db/mlflow?Password=hush", "mysql+pymysql://db/mlflow"),
        ("postgresql://db/mlflow?options=-c%20password%3Dhush", "postgresql://db/mlflow"),
        ("postgresql://deme:h@hush@db/mlflow", "postgresql://db/mlflow"),
        ("postgresql://deme:a?hush@db/mlflow", "postgresql://…"),
        ("postgresql://db/mlflow?password=a@hush", "postgresql://…"),
        ("http://mlflow:5001/path", "http://mlflow:5001/path"),
        ("sqlite:////data/my@home/mlflow.db", "sqlite:////data/my@home/mlflow.db"),
        ("file:///data/my@runs", "file:///data/my@runs"),
        ("./a:b@c", "./a:b@c"),
    ],
)
def test_of_a_database_messages_show_scheme_host_and_name(
    monkeypatch: pytest.MonkeyPatch, uri: str, place: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Settings().tracking_place == place
