"""Artifacts: what a stage made, whole and verified, under a digest of everything that decided it.

In the store::

    <stage>/<digest>/upload-<random>/<name>    the files, in a folder of their own for every writer
    <stage>/<digest>/manifest.json             written last, and once: with it the artifact comes to exist

In the cache the copy of an artifact lies under a digest of its manifest, too: one that was taken out of the store and
made anew, perhaps on another machine, is another.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from deme_core.code_version import code_version
from deme_core.digests import sha256_bytes
from deme_core.errors import (
    ArtifactNotFoundError,
    ChecksumMismatchError,
    DamagedArtifactError,
    DemeError,
    InputError,
)
from deme_core.file_store import FileStore
from deme_core.local_files import check_space, local_errors, sync, temporary_beside
from deme_core.manifest import DIGEST, UPLOADED, ArtifactRef, Manifest, StoredFile, malformed, manifest_key
from deme_core.store import ObjectStore, store_time
from deme_core.transfers import download_file, side_by_side, upload_folder


class ArtifactStore:
    """Publishes, finds and fetches artifacts; safe for many processes on many machines at once.

    Args:
        store: where they are kept.
        cache: folder for verified copies; may be deleted at any time.
    """

    def __init__(self, store: ObjectStore, cache: Path) -> None:
        self.store, self.cache = store, cache

    def find(self, stage: str, digest: str) -> ArtifactRef | None:
        """Return the artifact if there is one."""
        return self._ref(stage, digest) if self.store.exists(manifest_key(stage, digest)) else None

    def find_metrics(self, stage: str, digest: str) -> tuple[ArtifactRef, dict[str, Any]] | None:
        """Return the artifact and its metrics if there is one; a manifest that is damaged is taken out of the store."""
        if (ref := self.find(stage, digest)) is None:
            return None
        try:
            return ref, self.manifest(ref).metrics
        except (ArtifactNotFoundError, ChecksumMismatchError):
            self.withdraw(ref)
            return None

    def list_refs(self, stage: str) -> list[ArtifactRef]:
        """All artifacts of a stage, sorted by digest."""
        pattern = re.compile(rf"{re.escape(stage)}/({DIGEST})/manifest\.json")
        matches = (pattern.fullmatch(found.key) for found in self.store.list(f"{stage}/"))
        return [self._ref(stage, digest) for digest in sorted(match[1] for match in matches if match)]

    def newest(self, stage: str) -> ArtifactRef | None:
        """The last one by digest, for stages whose digests count up (checkpoints)."""
        return next(reversed(self.list_refs(stage)), None)

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """Read the manifest.

        Without one there is no artifact (ArtifactNotFoundError); a malformed one, or that of another artifact, is a
        ChecksumMismatchError.
        """
        return self._parse(ref, self.manifest_text(ref))

    def manifest_text(self, ref: ArtifactRef) -> bytes:
        """Read the manifest as it is stored; ArtifactNotFoundError if there is none."""
        return self.store.get_bytes(manifest_key(*self._locate(ref)))

    def _parse(self, ref: ArtifactRef, text: bytes) -> Manifest:
        stage, digest = self._locate(ref)
        uri = f"{ref.uri}/manifest.json"
        manifest = Manifest.from_json(text, uri=uri)
        if (manifest.stage, manifest.digest) != (stage, digest):
            raise malformed(uri, f"it belongs to {manifest.stage}/{manifest.digest}")
        return manifest

    def folder_uri(self, ref: ArtifactRef) -> str:
        """URI of the folder that holds the artifact's files under their names, for programs that know no manifest."""
        file = self.manifest(ref).files[0]
        return f"{self.store.uri}/{file.key.removesuffix('/' + file.name)}"

    def publish(
        self,
        stage: str,
        digest: str,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        dataset: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        take_folder: bool = False,
        look_first: bool = True,
    ) -> tuple[ArtifactRef, dict[str, Any]]:
        """Upload all files of a folder as an artifact; of several writers of one digest the first wins.

        Args:
            stage: name of the stage: a word, or a word and digests joined by slashes.
            digest: name of the work, unique within the stage.
            folder: what the stage made.
            settings: resolved settings.
            inputs: digests of the input artifacts, by role.
            dataset: fingerprint of the data set.
            metrics: what was measured.
            take_folder: move the folder into the cache, if that is on the same disk: what was made here need not be
                downloaded here.
            look_first: spare the upload if the artifact is there; False for whoever has just looked.

        Returns:
            The artifact and its metrics: this one, or the one that was there first.
        """
        key, ref = manifest_key(stage, digest), self._ref(stage, digest)
        if look_first and self.store.exists(key):
            return ref, self.manifest(ref).metrics
        manifest = Manifest(
            stage=stage,
            digest=digest,
            settings=dict(settings),
            inputs=dict(inputs),
            dataset=dataset,
            metrics=dict(metrics or {}),
            files=(),
            code_version=code_version(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        manifest.to_json()  # Before anything travels: what cannot be written must leave nothing behind.
        files = upload_folder(self.store, folder, f"{stage}/{digest}/upload-{uuid4().hex}")
        text = replace(manifest, files=files).to_json().encode()
        # A retry after a lost answer finds our own manifest: then we have won all the same.
        if not self.store.put_bytes(key, text, if_absent=True) and (first := self.store.get_bytes(key)) != text:
            self._delete_files(files)
            return ref, self._parse(ref, first).metrics
        if take_folder:
            _move(folder, self._copy(ref, text))
        return ref, manifest.metrics

    def fetch(self, ref: ArtifactRef) -> Path:
        """Return a verified local copy, downloading it the first time. Treat it as read-only.

        The manifest is read each time. A missing artifact is an ArtifactNotFoundError; one of which a file is lost or
        not what the manifest promises is a DamagedArtifactError; a file that arrives otherwise each time, or a
        malformed manifest, is a ChecksumMismatchError. All name the object.
        """
        return self.bring(ref, self.manifest_text(ref))

    def bring(self, ref: ArtifactRef, text: bytes) -> Path:
        """Return a verified local copy of what the text of a manifest promises; errors as of `fetch`."""
        folder = self._copy(ref, text)
        if folder.is_dir():
            with suppress(OSError):  # Whoever cannot write there can still read.
                os.utime(folder)  # Its last use, for whoever sweeps the cache.
            return folder
        manifest = self._parse(ref, text)
        with local_errors(folder), temporary_beside(folder) as temporary:
            temporary.mkdir()
            check_space(temporary, sum(file.size for file in manifest.files))
            side_by_side(lambda file: self._download(ref, file, temporary / file.name), manifest.files)
            try:
                temporary.rename(folder)
            except OSError:
                # Another process may have finished first; its copy is as good.
                if not folder.is_dir():
                    raise
        return folder

    def withdraw(self, ref: ArtifactRef) -> None:
        """Take an artifact with a damaged manifest out of sight, so that its stage is run again.

        A manifest that is sound now, since another machine was here before, stays. What is left of the files is swept.
        """
        with suppress(ArtifactNotFoundError):
            text = self.manifest_text(ref)
            try:
                self._parse(ref, text)
            except ChecksumMismatchError:
                self.store.delete_if(manifest_key(*self._locate(ref)), text)

    def remove(self, ref: ArtifactRef) -> None:
        """Remove an artifact and its local copies; a missing one is fine.

        The manifest goes first, so that no reader finds a part of the artifact.
        """
        stage, digest = self._locate(ref)
        try:
            files = self.manifest(ref).files
        except (ArtifactNotFoundError, ChecksumMismatchError):
            # What nobody can name any more is left to sweep.
            files = ()
        self.store.delete(manifest_key(stage, digest))
        self._delete_files(files)
        for copy in (self.cache / stage).glob(f"{digest}-*"):
            with local_errors(copy), suppress(FileNotFoundError), temporary_beside(copy) as doomed:
                # Renamed first: if this is interrupted, no part may stay that a later fetch would trust.
                copy.rename(doomed)

    def sweep(self, older_than: timedelta) -> int:
        """Delete what interrupted uploads and downloads left behind.

        Args:
            older_than: spare anything younger, by the store's own clock; must exceed the longest transfer.

        Returns:
            Number of objects deleted.
        """
        before = store_time(self.store) - older_than
        suspects: dict[str, set[str]] = {}
        for found in self.store.list(""):
            if found.modified < before and (match := UPLOADED.fullmatch(found.key)):
                suspects.setdefault(match["artifact"], set()).add(found.key)
        # Manifests are read only now: one written during the listing must protect its files.
        orphans: list[str] = []
        for artifact, keys in suspects.items():
            with suppress(ChecksumMismatchError):  # What a malformed manifest named stays until somebody mends it.
                orphans += keys - self._named_keys(artifact)
        for key in orphans:
            self.store.delete(key)
        self.store.discard_unfinished(before)
        cache = FileStore(self.cache)
        cache.discard_unfinished(store_time(cache) - older_than)
        return len(orphans)

    def _copy(self, ref: ArtifactRef, text: bytes) -> Path:
        """Where in the cache the artifact lies that has this manifest."""
        stage, digest = self._locate(ref)
        return self.cache / stage / f"{digest}-{sha256_bytes(text)[:16]}"

    def _named_keys(self, artifact: str) -> set[str]:
        stage, _, digest = artifact.rpartition("/")
        try:
            return {file.key for file in self.manifest(self._ref(stage, digest)).files}
        except ArtifactNotFoundError:
            return set()

    def _download(self, ref: ArtifactRef, file: StoredFile, path: Path) -> None:
        if problem := download_file(self.store, file, path):
            raise _damaged(ref, problem)

    def _delete_files(self, files: tuple[StoredFile, ...]) -> None:
        for file in files:
            self.store.delete(file.key)

    def _ref(self, stage: str, digest: str) -> ArtifactRef:
        return ArtifactRef(f"{self.store.uri}/{stage}/{digest}", digest)

    def _locate(self, ref: ArtifactRef) -> tuple[str, str]:
        """Stage and digest of a reference into this store."""
        located = ref.stage, ref.digest
        if self._ref(*located) != ref:
            raise InputError(f"{ref.uri} is not in the object store {self.store.uri}; correct DEME_STORE_URI.")
        return located


def _move(folder: Path, place: Path) -> None:
    """Moves a folder into the cache; where that cannot be, it stays, and a fetch downloads what it held."""
    with suppress(OSError):
        # Side by side, since one commit of the file system's journal then does for several.
        side_by_side(sync, [path for path in folder.rglob("*") if path.is_file()])
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(place)


def fetch_or_withdraw(artifacts: ArtifactStore, ref: ArtifactRef) -> Path:
    """Fetch what a stage made; if it is damaged, take it out of the store, so that the next run makes it anew.

    What another machine has put in its place meanwhile stays.

    Raises:
        DamagedArtifactError: it is damaged.
    """
    text = artifacts.manifest_text(ref)
    try:
        return artifacts.bring(ref, text)
    except DamagedArtifactError as error:
        try:
            withdrawn = artifacts.store.delete_if(manifest_key(ref.stage, ref.digest), text)
        except DemeError:  # Whoever may not write there is told what is damaged.
            raise error from None
        anew = "it was taken out of the store: run again, which makes it anew"
        mend = anew if withdrawn else "another was put in its place meanwhile: run again"
        raise DamagedArtifactError(ref.uri, error.problem, mend) from error


def _damaged(ref: ArtifactRef, problem: str) -> DamagedArtifactError:
    return DamagedArtifactError(ref.uri, problem, f"remove {ref.uri}/manifest.json and run again")
