"""The version of the code that made something: that of the package, and a digest of its sources.

Between two releases every checkout has the same version; their sources tell them apart.
"""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("deme_core", "tasks", "flows")


@cache
def code_version() -> str:
    """Returns the version, e.g. ``0.1.0+3f2a9c41d0be``: the same wherever the same sources are installed."""
    return version_of(Path(__file__).resolve().parents[1])


def version_of(root: Path) -> str:
    """Returns the same for the packages in a folder."""
    paths = sorted(path.relative_to(root).as_posix() for name in _PACKAGES for path in (root / name).rglob("*.py"))
    digest = hashlib.sha256()
    for path in paths:
        source = (root / path).read_bytes()
        digest.update(f"{path} {len(source)}\n".encode())
        digest.update(source)
    return f"{version('deme')}+{digest.hexdigest()[:12]}"
