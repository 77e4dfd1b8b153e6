"""New checkpoints under a prefix of an object store: which are whole, and which were dealt with before."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from deme_core.digests import canonical_json, sha256_bytes
from deme_core.errors import ArtifactNotFoundError
from deme_core.store import ObjectStore, StoredObject

_WEIGHTS = "diffusion_pytorch_model"
# What makes a folder the root of a model, in both layouts of the hub.
_ROOT = re.compile(r"(?:(?P<folder>.+)/)?(?:model_index\.json|unet/config\.json|scheduler_config\.json)")
# A claim whose owner did not start its run in this time is taken over.
CLAIM_LASTS = timedelta(minutes=5)


@dataclass(frozen=True)
class Folder:
    """A model folder in the making, or whole.

    Attributes:
        path: relative to the prefix; empty for the prefix itself.
        objects: everything in it, sorted by key.
    """

    path: str
    objects: tuple[StoredObject, ...]

    @property
    def fingerprint(self) -> str:
        """Digest of the listing: names, sizes and times."""
        rows = [(item.key, item.size, item.modified.isoformat()) for item in self.objects]
        return sha256_bytes(canonical_json(rows).encode())

    @property
    def newest(self) -> datetime:
        """When something in it was last written."""
        return max(item.modified for item in self.objects)

    def names(self) -> set[str]:
        """Names within the folder."""
        return {item.key.removeprefix(f"{self.path}/") if self.path else item.key for item in self.objects}


def find_folders(store: ObjectStore) -> list[Folder]:
    """Returns the model folders of a store, those still being uploaded included, sorted by path."""
    objects = sorted(store.list(""), key=lambda item: item.key)
    roots = {match["folder"] or "" for item in objects if (match := _ROOT.fullmatch(item.key))}
    # scheduler/scheduler_config.json of a folder makes no second one.
    roots = {
        root for root in roots if not (root.rpartition("/")[2] in ("scheduler", "unet") and _parent(root) in roots)
    }
    return [
        Folder(root, tuple(item for item in objects if not root or item.key.startswith(f"{root}/")))
        for root in sorted(roots)
    ]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def why_unfinished(store: ObjectStore, folder: Folder, *, settled_before: datetime) -> str | None:
    """Returns why a folder seems to be still uploaded; None if it seems whole.

    Args:
        store: holds it.
        folder: as it was listed.
        settled_before: a folder in which anything is newer than this is left alone.
    """
    if folder.newest > settled_before:
        return f"it changed at {folder.newest:%H:%M:%S}"
    names = folder.names()
    unet = "unet/" if any(name.startswith("unet/") for name in names) else ""
    scheduler = "scheduler/" if any(name.startswith("scheduler/") for name in names) else ""
    wanted = {f"{unet}config.json", f"{scheduler}scheduler_config.json"}
    index = f"{unet}{_WEIGHTS}.safetensors.index.json"
    if index in names:
        wanted |= {f"{unet}{name}" for name in _named_by(store, f"{folder.path}/{index}".lstrip("/"))}
    elif f"{unet}{_WEIGHTS}.bin" not in names:  # Pickled weights are not missing; they are refused.
        wanted.add(f"{unet}{_WEIGHTS}.safetensors")
    missing = sorted(wanted - names)
    return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing" if missing else None


def _named_by(store: ObjectStore, index: str) -> set[str]:
    try:
        return {str(name) for name in json.loads(store.get_bytes(index))["weight_map"].values()}
    except (ArtifactNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return set()  # Whoever opens the folder says what is wrong with it.


class Ledger:
    """What watchers found and started, kept in the object store: a lost Prefect database starts nothing again.

    Args:
        store: DeMe's own.
        watch: all that tells one watch from another, e.g. prefix, recipe and overrides.
    """

    def __init__(self, store: ObjectStore, watch: list[Any]) -> None:
        self._store = store
        self.name = sha256_bytes(canonical_json(watch).encode())[:16]
        self._folder = f"watch/{self.name}"

    def outcome(self, folder: Folder) -> dict[str, Any] | None:
        """Returns what `note` was told of this very listing."""
        return self._get(f"looks/{folder.fingerprint}")

    def note(self, folder: Folder, outcome: dict[str, Any]) -> None:
        """Remembers what became of a folder, so that it is read and reported once."""
        self._put(f"looks/{folder.fingerprint}", {"folder": folder.path, **outcome})

    def claim(self, digest: str, owner: str, now: datetime) -> bool:
        """Whether ``owner`` shall start the run for the weights ``digest``: one of all watchers may, once."""
        entry = {"owner": owner, "claimed": now.isoformat()}
        if self._put(f"starts/{digest}", entry, if_absent=True):
            return True
        found = self._get(f"starts/{digest}")
        if found is None or "flow_run_id" in found:
            return False
        # Whoever claimed it may have died in between. Two may take over at once; Prefect's idempotency key makes
        # that one run.
        if now - datetime.fromisoformat(found["claimed"]) < CLAIM_LASTS:
            return False
        self._put(f"starts/{digest}", entry)
        return True

    def started(self, digest: str, flow_run_id: str) -> None:
        """Completes a claim."""
        entry = {**(self._get(f"starts/{digest}") or {}), "flow_run_id": flow_run_id}
        self._put(f"starts/{digest}", entry)

    def starts(self) -> Iterator[str]:
        """Yields the digests for which a run was claimed or started."""
        for item in self._store.list(f"{self._folder}/starts/"):
            yield item.key.rpartition("/")[2].removesuffix(".json")

    def _get(self, name: str) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(self._store.get_bytes(f"{self._folder}/{name}.json"))
        except ArtifactNotFoundError:
            return None
        return content

    def _put(self, name: str, content: dict[str, Any], *, if_absent: bool = False) -> bool:
        text = canonical_json(content).encode()
        return self._store.put_bytes(f"{self._folder}/{name}.json", text, if_absent=if_absent)


def utc_now() -> datetime:
    """Returns the time, aware."""
    return datetime.now(UTC)
