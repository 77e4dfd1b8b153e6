"""State that travels between machines in files of limited size.

One uncompressed tar is cut into parts, ``part-000``, ``part-001``, …; ``index.json`` has the sha256 of each and is
written last. ``cat part-* | tar x`` joins them without this module.
"""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

from deme_core.digests import sha256_file

PART_BYTES = 15_000_000
_INDEX, _TAR = "index.json", ".joined.tar"


def pack(root: Path, paths: Iterable[Path], state: Path, *, part_bytes: int = PART_BYTES) -> int:
    """Writes files below ``root`` into the folder ``state``, in place of what was there; returns how many parts."""
    fresh = state.with_name(f".{state.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    whole, parts = fresh / _TAR, {}
    with tarfile.open(whole, "w") as tar:
        for path in sorted(paths):
            tar.add(path, path.relative_to(root).as_posix())
    with whole.open("rb") as source:
        while piece := source.read(part_bytes):
            name = f"part-{len(parts):03d}"
            (fresh / name).write_bytes(piece)
            parts[name] = hashlib.sha256(piece).hexdigest()
    whole.unlink()
    (fresh / _INDEX).write_text(json.dumps({"format": 1, "parts": parts}, indent=1))
    shutil.rmtree(state, ignore_errors=True)
    fresh.rename(state)
    return len(parts)


def unpack(state: Path, root: Path) -> bool:
    """Writes what ``state`` holds below ``root``; returns whether there was any.

    Raises:
        ValueError: a part is missing or is not what the index says.
    """
    if not (state / _INDEX).exists():
        return False
    parts = json.loads((state / _INDEX).read_text())["parts"]
    joined = root / _TAR
    with joined.open("wb") as out:
        for name, sha256 in parts.items():
            if not (state / name).exists() or sha256_file(state / name) != sha256:
                raise ValueError(f"{state / name} is missing or damaged; bring the state of one piece over whole.")
            out.write((state / name).read_bytes())
    with tarfile.open(joined) as tar:
        tar.extractall(root, filter="data")
    joined.unlink()
    return True
