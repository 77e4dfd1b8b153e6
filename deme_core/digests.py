"""Digests: the names of artifacts, and what proves that a file arrived whole."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> str:
    """Write a JSON value in the one form that is digested: sorted keys, no whitespace, tuples as lists.

    NaN and infinity, which JSON cannot hold, are a ValueError; any other type is a TypeError.
    """
    # Through JSON once: only then are integer keys strings, which sort alike before and after storage.
    plain = json.loads(json.dumps(value, allow_nan=False))
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def spell_infinities(value: Any) -> Any:
    """Return a JSON value with infinities and NaN as text: some configs of schedulers hold them."""
    if isinstance(value, dict):
        return {key: spell_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spell_infinities(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def json_digest(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value in its canonical form; errors are those of canonical_json."""
    return sha256_bytes(canonical_json(value).encode())


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in small pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_digest(
    stage: str,
    *,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    dataset: str | None = None,
    version: int,
) -> str:
    """Name the work of a stage, so that the same work is found again on any machine.

    Args:
        stage: name of the stage.
        settings: its resolved settings; only those that change the result.
        inputs: digests of its input artifacts, by role.
        dataset: fingerprint of the data set, for a stage that reads one.
        version: raised when the code of the stage starts to give another result.

    Returns:
        Hexadecimal SHA-256 of the canonical JSON of these.
    """
    work = {
        "stage": stage,
        "settings": dict(settings),
        "inputs": dict(inputs),
        "dataset": dataset,
        "version": version,
    }
    return json_digest(work)
