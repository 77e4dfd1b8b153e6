import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_file_names_the_image_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = [path for path in (ROOT / "deployments").rglob("*") if path.is_file()]
    named = {
        path.name: set(re.findall(r"\bdeme:([\w.]+)", path.read_text()))
        for path in (*files, ROOT / "docker-compose.yml", ROOT / "docs" / "operations.md")
    }
    tagged = {name: tags for name, tags in named.items() if tags}
    assert tagged.keys() == {
        "Dockerfile",
        "docker.json",
        "kubernetes.json",
        "ray-cluster.yaml",
        "docker-compose.yml",
        "operations.md",
    }
    assert set().union(*tagged.values()) == {version}
