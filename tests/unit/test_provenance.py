"""What it takes to do a run again."""

import platform
import tomllib
from importlib.metadata import version
from pathlib import Path

from deme_core.artifacts import ArtifactStore
from deme_core.manifest import ArtifactRef
from deme_core.store import open_store
from tasks.jobs import JobResult
from tasks.provenance import model_digests, versions


def test_versions_are_those_of_this_environment() -> None:
    found = versions()
    assert found["Python"] == platform.python_version()
    assert (found["torch"], found["diffusers"]) == (version("torch"), version("diffusers"))
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert found["deme"].startswith(f"{project['version']}+")
    assert "not installed" not in found.values()
    assert found["processor"]


def test_digests_name_models_trainings_and_the_images_that_these_saw(tmp_path: Path) -> None:
    artifacts = ArtifactStore(open_store((tmp_path / "store").as_uri()), tmp_path / "cache")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "weights").write_bytes(b"w")
    trained, _ = artifacts.publish("finetune", "c" * 64, tmp_path / "copy", settings={}, inputs={}, dataset="d" * 64)
    merged = ArtifactRef("file:///store/merged/e", "e")
    found = model_digests(
        artifacts,
        {"merged": JobResult(merged, {}, False, 1.0, 0.0)},
        {"segment 0": JobResult(trained, {}, False, 1.0, 0.0)},
    )
    assert found == {"model merged": "e", "training of segment 0": "c" * 64, "training images": "d" * 64}
