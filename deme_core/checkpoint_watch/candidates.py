"""Folders of a listing that claim to hold a model, in either layout that `deme_core.model_folder` reads."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from deme_core.digests import json_digest
from deme_core.model_json import INDEX_NAME, SUFFIXES
from deme_core.store import StoredObject

DENOISERS = ("unet", "transformer")
_FROZEN = ("vae", "text_encoder", "tokenizer", "image_encoder", "feature_extractor", "safety_checker")
_NUMBERED = tuple(f"{name}_{number}" for name in ("text_encoder", "tokenizer") for number in (2, 3))
_PARTS = {*DENOISERS, "scheduler", *_FROZEN, *_NUMBERED}
# DeMe's own artifacts: a merged model under the prefix must not be taken for a new checkpoint.
_ARTIFACT = re.compile(r"(?:^|/)upload-[0-9a-f]{32}/")


@dataclass(frozen=True)
class Candidate:
    """A folder that may hold a model.

    Attributes:
        folder: its path within the listing; empty for the listing's own root.
        files: those of its objects that a model folder consists of, by their path within the folder.
    """

    folder: str
    files: Mapping[str, StoredObject]

    @property
    def denoiser(self) -> str:
        """Where the denoiser lies: ``unet/``, ``transformer/``, or empty for the flat layout."""
        transformer = any(file.startswith("transformer/") for file in self.files)
        return "transformer/" if transformer else self._part("unet", "config.json")

    @property
    def configs(self) -> tuple[str, str]:
        """Names of the configs of denoiser and scheduler, whether they are there or not."""
        scheduler = self._part("scheduler", "scheduler_config.json")
        return f"{self.denoiser}config.json", f"{scheduler}scheduler_config.json"

    def key(self, name: str) -> str:
        """Key in the listing of one of its files, or, for the empty name, what all of them begin with."""
        return f"{self.folder}/{name}" if self.folder else name

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the listing: folder, and names, sizes, times and versions of files."""
        return json_digest([self.folder, sorted(file.identity for file in self.files.values())])

    @property
    def modified(self) -> datetime:
        """When its newest file was written, by the store's clock."""
        return max(file.modified for file in self.files.values())

    def _part(self, name: str, config: str) -> str:
        # A folder that is still empty is known by its neighbour.
        parts = {file.partition("/")[0] for file in self.files if "/" in file}
        return f"{name}/" if name in parts or (parts and config not in self.files) else ""


def find_candidates(objects: Iterable[StoredObject]) -> Iterator[Candidate]:
    """Yields the folders that hold a ``model_index.json``, or the configs of a denoiser and its scheduler."""
    folders: dict[str, dict[str, StoredObject]] = defaultdict(dict)
    for found in objects:
        if not found.key.endswith(SUFFIXES) or _ARTIFACT.search(found.key):
            continue
        folder, _, name = found.key.rpartition("/")
        folders[folder][name] = found
        parent, _, part = folder.rpartition("/")
        if part in _PARTS:
            folders[parent][f"{part}/{name}"] = found
    for folder, files in sorted(folders.items()):
        candidate = Candidate(folder, files)
        if INDEX_NAME in files or files.keys() >= set(candidate.configs):
            yield candidate
