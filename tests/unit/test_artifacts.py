import json
from dataclasses import replace
from pathlib import Path

import pytest

from deme_core.artifacts import ArtifactStore
from deme_core.errors import ChecksumMismatchError
from deme_core.file_store import FileStore
from deme_core.manifest import ArtifactRef, Manifest, StoredFile
from deme_core.store import open_store
from tests.store_contract import ANY_AGE, DIGEST, ArtifactContract

UPLOAD = f"merge/{DIGEST}/upload-{'0' * 32}"
FILE = StoredFile("unet/config.json", f"{UPLOAD}/unet/config.json", 2, "f" * 64)
MANIFEST = Manifest(
    stage="merge",
    digest=DIGEST,
    settings={"weights": [0.3, 0.7]},
    inputs={"pretrained": "p"},
    dataset=None,
    metrics={},
    files=(FILE,),
    code_version="0.1.0",
    created="2026-11-23T00:00:00+00:00",
)


class TestArtifactsInFiles(ArtifactContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> FileStore:
        return FileStore(tmp_path / "store")


def test_a_manifest_survives_json() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up", "a\\b", "", "a//b"])
def test_a_file_outside_its_artifact_is_refused(name: str) -> None:
    text = replace(MANIFEST, files=(replace(FILE, name=name),)).to_json()
    with pytest.raises(ChecksumMismatchError, match=r"files\.0\.name"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "key",
    ["merge/other", f"merge/{'e' * 64}/upload-{'0' * 32}/a", f"merge/{DIGEST}/manifest.json", f"{UPLOAD}/../../a"],
)
def test_an_object_outside_its_artifact_is_refused(key: str) -> None:
    text = replace(MANIFEST, files=(FILE, replace(FILE, name="other", key=key))).to_json()
    with pytest.raises(ChecksumMismatchError, match=key):
        Manifest.from_json(text)


@pytest.mark.parametrize("change", [{"size": -1}, {"sha256": "short"}, {"size": None}])
def test_a_malformed_file_entry_is_refused(change: dict[str, object]) -> None:
    data = json.loads(MANIFEST.to_json())
    data["files"][0].update(change)
    with pytest.raises(ChecksumMismatchError, match=f"here.json is malformed .files.0.{next(iter(change))}"):
        Manifest.from_json(json.dumps(data), uri="here.json")


@pytest.mark.parametrize("text", ["", "half a {", "[]", "{}", b"\xff"])
def test_what_is_no_manifest_is_refused(text: str | bytes) -> None:
    with pytest.raises(ChecksumMismatchError, match="malformed"):
        Manifest.from_json(text)


def test_nan_is_refused_before_anything_is_uploaded(tmp_path: Path) -> None:
    artifacts = ArtifactStore(FileStore(tmp_path / "store"), tmp_path / "cache")
    (tmp_path / "made").mkdir()
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.publish("merge", DIGEST, tmp_path / "made", settings={}, inputs={}, metrics={"fid": float("nan")})
    assert not (tmp_path / "store").exists()


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    artifacts = ArtifactStore(FileStore(tmp_path / "store"), tmp_path / "cache")
    with pytest.raises(ValueError, match="no folder"):
        artifacts.publish("merge", DIGEST, tmp_path / "made", settings={}, inputs={})


@pytest.mark.parametrize(
    ("stage", "digest"),
    [
        ("", DIGEST),
        ("Merge", DIGEST),
        ("a/b", DIGEST),
        ("../merge", DIGEST),
        ("merge", ""),
        ("merge", "a/b"),
        ("merge", ".."),
    ],
)
def test_names_must_be_told_apart(tmp_path: Path, stage: str, digest: str) -> None:
    with pytest.raises(ValueError, match="cannot name an artifact"):
        ArtifactStore(FileStore(tmp_path), tmp_path).find(stage, digest)


@pytest.mark.parametrize("stage", ["merge", f"checkpoints/{DIGEST}"])
@pytest.mark.parametrize("store", ["s3://bucket", "s3://bucket/team/prefix", f"s3://bucket/{'e' * 64}", "file:///a/b"])
def test_a_reference_knows_its_stage(store: str, stage: str) -> None:
    ref = ArtifactRef(f"{store}/{stage}/step-00000200", "step-00000200")
    assert (ref.stage, ref.store_uri) == (stage, store)


def test_the_folder_of_an_artifact_names_it(tmp_path: Path) -> None:
    artifacts, made = ArtifactStore(FileStore(tmp_path / "store"), tmp_path / "cache"), tmp_path / "made"
    for name in ("unet/config.json", "model_index.json"):
        made.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        made.joinpath(name).write_text("{}")
    ref, _ = artifacts.publish("merged", DIGEST, made, settings={}, inputs={})
    folder = artifacts.folder_uri(ref)
    assert ArtifactRef.of_folder(folder) == ArtifactRef.of_folder(ref.uri) == ref
    assert open_store(folder).get_bytes("unet/config.json") == b"{}"


def test_a_killed_download_is_swept(tmp_path: Path) -> None:
    artifacts = ArtifactStore(FileStore(tmp_path / "store"), tmp_path / "cache")
    half, whole = tmp_path / "cache/merge/.tmp-killed/unet/half", tmp_path / "cache/merge/whole/file"
    for path in (half, whole):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    artifacts.sweep(ANY_AGE)
    assert not half.exists() and whole.exists()


def test_a_malformed_manifest_keeps_no_other_artifact_from_being_swept(tmp_path: Path) -> None:
    artifacts = ArtifactStore(FileStore(tmp_path / "store"), tmp_path / "cache")
    upload = f"upload-{'0' * 32}/a"
    for key in (f"merged/bad/{upload}", f"merged/killed/{upload}"):
        artifacts.store.put_bytes(key, b"half")
    artifacts.store.put_bytes("merged/bad/manifest.json", b"{}")
    assert artifacts.sweep(ANY_AGE) == 1
    assert artifacts.store.exists(f"merged/bad/{upload}")
    assert not artifacts.store.exists(f"merged/killed/{upload}")
