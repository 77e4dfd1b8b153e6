"""Manifests: what an artifact is, and how it came to be, in the one object that makes it exist."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from deme_core.errors import ChecksumMismatchError
from deme_core.store import check_key

_HEX = "[0-9a-f]"
# A word, then digests: only so can the stage be told from the store's own path in the URI of an artifact.
_STAGE = rf"[a-z][a-z0-9_-]*(?:/{_HEX}{{64}})*"
DIGEST = r"(?!upload-)[A-Za-z0-9_-][A-Za-z0-9._-]*"
UPLOADED = re.compile(rf"(?P<artifact>{_STAGE}/{DIGEST})/upload-{_HEX}{{32}}/.+")


@dataclass(frozen=True)
class ArtifactRef:
    """A small reference to an artifact: all that tasks pass to one another.

    Attributes:
        uri: ``<store>/<stage>/<digest>``.
        digest: the last part of it.
    """

    uri: str
    digest: str

    @property
    def stage(self) -> str:
        """The stage that made it, e.g. ``finetune``, or ``checkpoints/<finetune digest>``."""
        match = re.search(rf"/({_STAGE})/{DIGEST}\Z", self.uri)
        if match is None:
            raise ValueError(f"{self.uri} is no URI of an artifact.")
        return match[1]

    @property
    def store_uri(self) -> str:
        """The store it is in."""
        return self.uri.removesuffix(f"/{self.stage}/{self.digest}")

    @classmethod
    def of_folder(cls, uri: str) -> "ArtifactRef":
        """The artifact with the files of `ArtifactStore.folder_uri`; its own URI, which old runs have, does too."""
        artifact = re.sub(rf"/upload-{_HEX}{{32}}\Z", "", uri)
        return cls(artifact, artifact.rpartition("/")[2])


@dataclass(frozen=True)
class StoredFile:
    """One file of an artifact.

    Attributes:
        name: POSIX path within the artifact.
        key: key of the object that holds it.
        size: bytes.
        sha256: hexadecimal SHA-256.
    """

    name: Annotated[str, AfterValidator(check_key)]
    key: Annotated[str, AfterValidator(check_key)]
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=rf"^{_HEX}{{64}}$")]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, and how it came to be.

    Attributes:
        stage: name of the stage.
        digest: digest of the work.
        settings: resolved settings of the stage.
        inputs: digests of the input artifacts, by role.
        dataset: fingerprint of the data set, if the stage read one.
        metrics: what the stage measured.
        files: its files.
        code_version: version of DeMe that made it, with a digest of its sources.
        created: ISO 8601, UTC.
    """

    stage: str
    digest: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    dataset: str | None
    metrics: dict[str, Any]
    files: tuple[StoredFile, ...]
    code_version: str
    created: str

    def to_json(self) -> str:
        """Write as indented JSON; NaN or infinity among settings or metrics is a ValueError."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes, *, uri: str = "manifest.json") -> "Manifest":
        """Read and validate.

        Text that is no manifest, or names a file outside its artifact, is a ChecksumMismatchError that says ``uri``.
        """
        try:
            manifest = _ADAPTER.validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "text"
            raise malformed(uri, f"{where}: {problem['msg']}") from error
        for file in manifest.files:
            home = UPLOADED.fullmatch(file.key)
            if home is None or home["artifact"] != f"{manifest.stage}/{manifest.digest}":
                raise malformed(uri, f"{file.key!r} is not an object of this artifact")
        return manifest


_ADAPTER = TypeAdapter(Manifest)


def manifest_key(stage: str, digest: str) -> str:
    """Key of an artifact's manifest; a ValueError for names that no artifact can have."""
    if not re.fullmatch(_STAGE, stage) or not re.fullmatch(DIGEST, digest):
        raise ValueError(
            f"Stage {stage!r} and digest {digest!r} cannot name an artifact: a stage is a lower-case word, or one and "
            "SHA-256 digests joined by slashes; a digest is one plain file name."
        )
    return f"{stage}/{digest}/manifest.json"


def malformed(uri: str, problem: str) -> ChecksumMismatchError:
    """The error of a manifest that is none, or another's."""
    return ChecksumMismatchError(f"{uri} is malformed ({problem}); remove it and run its stage again.")
