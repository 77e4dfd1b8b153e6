import shutil
from importlib.metadata import version
from pathlib import Path

from typer.testing import CliRunner

import deme_core
from deme_core.code_version import code_version, version_of
from flows.cli import app

ROOT = Path(deme_core.__file__).parents[1]


def test_it_begins_with_the_version_of_the_package() -> None:
    release, _, digest = code_version().partition("+")
    assert release == version("deme")
    assert len(digest) == 12


def test_the_command_line_tells_it() -> None:
    told = CliRunner().invoke(app, ["--version"])
    assert (told.exit_code, told.stdout) == (0, f"{code_version()}\n")


def test_copies_of_the_sources_have_the_same_version_wherever_they_lie(tmp_path: Path) -> None:
    assert version_of(_copy(tmp_path / "here")) == version_of(_copy(tmp_path / "there")) == code_version()


def test_a_changed_a_renamed_and_a_new_file_make_another(tmp_path: Path) -> None:
    seen = {code_version()}
    root = _copy(tmp_path)
    for change in (
        lambda: (root / "tasks" / "worker.py").open("a").write("\n"),
        lambda: (root / "flows" / "cli.py").rename(root / "flows" / "cli2.py"),
        lambda: (root / "deme_core" / "search" / "new.py").touch(),
    ):
        change()
        seen.add(version_of(root))
    assert len(seen) == 4


def _copy(root: Path) -> Path:
    for name in ("deme_core", "tasks", "flows"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root
