"""What every object store promises, and artifacts on top: each backend runs it with a `store` fixture of its own."""

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from deme_core import file_store, s3_store, transfers
from deme_core.artifacts import ArtifactStore, fetch_or_withdraw
from deme_core.digests import sha256_file
from deme_core.errors import (
    ArtifactNotFoundError,
    ChecksumMismatchError,
    DamagedArtifactError,
    InputError,
    ObjectTooLargeError,
    StoreUnavailableError,
)
from deme_core.manifest import ArtifactRef
from deme_core.store import Digest, ObjectStore, check_access

NUM_WRITERS = 8
DIGEST = "d" * 64
# Counts all that was written by now as old, whatever the server's clock says.
ANY_AGE = timedelta(minutes=-5)


def race(act: Callable[[int], Any]) -> list[Any]:
    """Let all writers start at the same moment."""
    barrier = Barrier(NUM_WRITERS)

    def start(writer: int) -> Any:
        barrier.wait()
        return act(writer)

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return list(pool.map(start, range(NUM_WRITERS)))


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return sorted(found.key for found in store.list(prefix))


class StoreContract:
    @pytest.mark.parametrize("key", ["a", "unet/config.json", "deep/er/with space, ünï & 100%+.bin"])
    def test_bytes_come_back(self, store: ObjectStore, key: str) -> None:
        assert store.put_bytes(key, b"\x00\xff")
        assert store.exists(key)
        assert store.get_bytes(key) == b"\x00\xff"
        assert keys(store) == [key]

    def test_an_empty_object_is_an_object(self, store: ObjectStore, tmp_path: Path) -> None:
        store.put_bytes("empty", b"")
        store.get_file("empty", tmp_path / "empty", max_bytes=0)
        assert (tmp_path / "empty").read_bytes() == b""

    def test_a_part_comes_back(self, store: ObjectStore) -> None:
        store.put_bytes("key", b"0123456789")
        assert store.get_range("key", 3, 4) == b"3456"
        assert store.get_range("key", 8, 4) == b"89"
        assert store.get_range("key", 10, 4) == b""
        with pytest.raises(ArtifactNotFoundError, match="missing"):
            store.get_range("missing", 3, 4)

    def test_a_later_write_replaces(self, store: ObjectStore) -> None:
        assert store.put_bytes("a", b"old")
        assert store.put_bytes("a", b"new")
        assert store.get_bytes("a") == b"new"

    def test_a_large_file_comes_back(self, store: ObjectStore, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "new" / "folder" / "target"
        source.write_bytes(os.urandom(20 * 2**20 + 1))
        store.put_file("large", source)
        digest = hashlib.sha256()
        store.get_file("large", target, digest, max_bytes=source.stat().st_size)
        assert sha256_file(target) == sha256_file(source) == digest.hexdigest()
        assert [path.name for path in target.parent.iterdir()] == ["target"]

    def test_a_missing_object_is_named(self, store: ObjectStore, tmp_path: Path) -> None:
        store.put_bytes("folder/other", b"")
        for key in ("missing", "folder/missing", "folder", "folder/other/below"):
            assert not store.exists(key)
            with pytest.raises(ArtifactNotFoundError, match=f"{store.uri}/{key} "):
                store.get_bytes(key)
            with pytest.raises(ArtifactNotFoundError, match=f"{store.uri}/{key} "):
                store.get_file(key, tmp_path / "target", max_bytes=1)
        assert not list(tmp_path.glob("*target*")) and not list(tmp_path.glob(".tmp-*"))

    def test_what_is_too_large_to_be_read_at_once_is_refused(
        self, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (file_store, s3_store):
            monkeypatch.setattr(module, "MAX_BYTES_AT_ONCE", 100)
        store.put_bytes("small", bytes(100))
        store.put_bytes("large", bytes(101))
        assert store.get_bytes("small") == bytes(100)
        with pytest.raises(ObjectTooLargeError, match="large holds more than 100 bytes"):
            store.get_bytes("large")

    def test_delete_is_idempotent(self, store: ObjectStore) -> None:
        store.put_bytes("a/b", b"")
        for _ in range(2):
            store.delete("a/b")
        assert not store.exists("a/b")
        assert keys(store) == []

    def test_only_what_is_still_there_is_deleted(self, store: ObjectStore) -> None:
        store.put_bytes("a", b"new")
        assert not store.delete_if("a", b"old")
        assert not store.delete_if("a", b"ne")
        assert store.get_bytes("a") == b"new"
        assert store.delete_if("a", b"new")
        assert not store.delete_if("a", b"new")
        assert keys(store) == []

    def test_list_takes_any_prefix(self, store: ObjectStore) -> None:
        for key in ("a", "ab/c", "ab/cd/e", "ab/d", "b"):
            store.put_bytes(key, key.encode())
        assert keys(store, "a") == ["a", "ab/c", "ab/cd/e", "ab/d"]
        assert keys(store, "ab/") == ["ab/c", "ab/cd/e", "ab/d"]
        assert keys(store, "ab/c") == ["ab/c", "ab/cd/e"]
        assert keys(store, "none/of/them") == []

    def test_list_tells_size_and_time(self, store: ObjectStore) -> None:
        store.put_bytes("a", b"12345")
        (found,) = store.list("")
        assert found.size == 5
        assert abs(found.modified - datetime.now(UTC)) < timedelta(minutes=1)

    def test_an_object_has_a_version_until_it_is_replaced(self, store: ObjectStore) -> None:
        store.put_bytes("a", b"12345")
        listed = [found for _ in range(2) for found in store.list("")]
        assert listed[0] == listed[1] and listed[0].version
        time.sleep(0.02)  # The clock of file systems ticks every few milliseconds; that of S3 every second.
        store.put_bytes("a", b"54321")
        (after,) = store.list("")
        assert after.version != listed[0].version

    @pytest.mark.parametrize(
        "key", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\\b", "a\0", ".tmp-a", "a/.tmp-b/c"]
    )
    def test_a_key_must_be_a_plain_relative_path(self, store: ObjectStore, key: str, tmp_path: Path) -> None:
        for act in (store.get_bytes, store.exists, store.delete, lambda key: store.put_bytes(key, b"")):
            with pytest.raises(ValueError, match="no object key"):
                act(key)

    def test_one_creator_wins_a_race(self, store: ObjectStore) -> None:
        wins = race(lambda writer: store.put_bytes("race/key", str(writer).encode(), if_absent=True))
        assert wins.count(True) == 1
        assert store.get_bytes("race/key") == str(wins.index(True)).encode()
        assert keys(store) == ["race/key"]

    def test_create_leaves_what_exists(self, store: ObjectStore) -> None:
        store.put_bytes("a", b"first")
        assert not store.put_bytes("a", b"second", if_absent=True)
        assert store.get_bytes("a") == b"first"

    def test_access_is_granted_and_leaves_nothing(self, store: ObjectStore) -> None:
        check_access(store)
        assert keys(store) == []


class Killed(BaseException):
    """What a test raises where a process would have been killed."""


class ArtifactContract:
    @pytest.fixture
    def artifacts(self, store: ObjectStore, tmp_path: Path) -> ArtifactStore:
        return ArtifactStore(store, tmp_path / "cache")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "made"
        (folder / "unet").mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        (folder / "unet" / "weights.safetensors").write_bytes(os.urandom(4096))
        return folder

    def publish(
        self,
        artifacts: ArtifactStore,
        folder: Path,
        stage: str = "finetune",
        digest: str = DIGEST,
        *,
        take_folder: bool = False,
        look_first: bool = True,
    ) -> ArtifactRef:
        ref, _ = artifacts.publish(
            stage,
            digest,
            folder,
            settings={"seed": 0},
            inputs={"pretrained": "p"},
            dataset="f",
            metrics={"loss": 0.5},
            take_folder=take_folder,
            look_first=look_first,
        )
        return ref

    def test_what_was_published_is_fetched(self, artifacts: ArtifactStore, folder: Path) -> None:
        ref = self.publish(artifacts, folder)
        assert ref == artifacts.find("finetune", DIGEST) == ArtifactRef(**asdict(ref))
        assert ref == ArtifactRef(f"{artifacts.store.uri}/finetune/{DIGEST}", DIGEST)
        copy = artifacts.fetch(ref)
        assert copy.parent == artifacts.cache / "finetune" and copy.name.startswith(f"{DIGEST}-")
        files = {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        assert files == {
            name: (folder / name).read_bytes() for name in ("model_index.json", "unet/weights.safetensors")
        }

    def test_the_manifest_tells_how_it_was_made(self, artifacts: ArtifactStore, folder: Path) -> None:
        manifest = artifacts.manifest(self.publish(artifacts, folder))
        assert (manifest.stage, manifest.digest, manifest.dataset) == ("finetune", DIGEST, "f")
        assert (manifest.settings, manifest.inputs, manifest.metrics) == (
            {"seed": 0},
            {"pretrained": "p"},
            {"loss": 0.5},
        )
        assert [file.name for file in manifest.files] == ["model_index.json", "unet/weights.safetensors"]
        assert datetime.fromisoformat(manifest.created).utcoffset() == timedelta(0)

    def test_the_second_fetch_needs_the_manifest_alone(self, artifacts: ArtifactStore, folder: Path) -> None:
        ref = self.publish(artifacts, folder)
        copy = artifacts.fetch(ref)
        self.delete_files(artifacts, ref)
        assert artifacts.fetch(ref) == copy

    def delete_files(self, artifacts: ArtifactStore, ref: ArtifactRef) -> None:
        for file in artifacts.manifest(ref).files:
            artifacts.store.delete(file.key)

    def test_a_missing_artifact_is_named(self, artifacts: ArtifactStore) -> None:
        ref = ArtifactRef(f"{artifacts.store.uri}/finetune/{DIGEST}", DIGEST)
        assert artifacts.find("finetune", DIGEST) is None
        with pytest.raises(ArtifactNotFoundError, match=ref.uri):
            artifacts.fetch(ref)

    def test_a_reference_into_another_store_is_refused(self, artifacts: ArtifactStore) -> None:
        with pytest.raises(InputError, match="DEME_STORE_URI"):
            artifacts.fetch(ArtifactRef(f"file:///elsewhere/finetune/{DIGEST}", DIGEST))

    def test_a_flipped_byte_is_an_error(self, artifacts: ArtifactStore, folder: Path) -> None:
        ref = self.publish(artifacts, folder)
        damaged = artifacts.manifest(ref).files[1]
        data = bytearray(artifacts.store.get_bytes(damaged.key))
        data[2048] ^= 1
        artifacts.store.put_bytes(damaged.key, bytes(data))
        with pytest.raises(DamagedArtifactError, match=damaged.key):
            artifacts.fetch(ref)
        assert not [path for path in artifacts.cache.rglob("*") if path.is_file()]
        assert artifacts.find("finetune", DIGEST) is not None

    def test_what_is_damaged_is_made_anew(self, artifacts: ArtifactStore, folder: Path) -> None:
        ref = self.publish(artifacts, folder)
        artifacts.store.put_bytes(artifacts.manifest(ref).files[1].key, b"damaged")
        with pytest.raises(DamagedArtifactError, match="run again, which makes it anew"):
            fetch_or_withdraw(artifacts, ref)
        assert artifacts.find("finetune", DIGEST) is None
        assert self.publish(artifacts, folder) == ref
        assert (fetch_or_withdraw(artifacts, ref) / "unet" / "weights.safetensors").stat().st_size == 4096
        assert artifacts.sweep(ANY_AGE) == 2

    def test_what_another_machine_made_anew_stays(
        self, artifacts: ArtifactStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two find the same damage; the other has computed and published anew before this one withdraws."""
        ref, get_file = self.publish(artifacts, folder), artifacts.store.get_file
        other = ArtifactStore(artifacts.store, tmp_path / "other")
        artifacts.store.put_bytes(artifacts.manifest(ref).files[1].key, b"damaged")

        def get_slowly(key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
            get_file(key, path, digest, max_bytes=max_bytes)
            with monkeypatch.context() as patch:
                patch.setattr(artifacts.store, "get_file", get_file)
                if not other.cache.exists():
                    with pytest.raises(DamagedArtifactError):
                        fetch_or_withdraw(other, ref)
                    self.publish(other, folder)

        with monkeypatch.context() as patch:
            patch.setattr(transfers, "_FILES_AT_ONCE", 1)
            patch.setattr(artifacts.store, "get_file", get_slowly)
            with pytest.raises(DamagedArtifactError, match="another was put in its place meanwhile"):
                fetch_or_withdraw(artifacts, ref)
        assert fetch_or_withdraw(artifacts, ref).is_dir()

    def test_only_a_damaged_manifest_is_withdrawn(self, artifacts: ArtifactStore, folder: Path) -> None:
        ref = self.publish(artifacts, folder)
        artifacts.withdraw(ref)
        assert artifacts.find("finetune", DIGEST) == ref
        artifacts.store.put_bytes(f"finetune/{DIGEST}/manifest.json", b"damaged")
        for _ in range(2):
            artifacts.withdraw(ref)
        assert artifacts.find("finetune", DIGEST) is None

    def test_a_manifest_that_is_mended_after_the_look_is_not_withdrawn(
        self, artifacts: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref = self.publish(artifacts, folder)
        key = f"finetune/{DIGEST}/manifest.json"
        sound = artifacts.store.get_bytes(key)

        def look_before_it_is_mended(_: ArtifactRef) -> bytes:
            artifacts.store.put_bytes(key, sound)
            return b"damaged"

        monkeypatch.setattr(artifacts, "manifest_text", look_before_it_is_mended)
        artifacts.withdraw(ref)
        assert artifacts.find("finetune", DIGEST) == ref

    def test_a_file_that_was_missed_once_is_looked_for_again(
        self, artifacts: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref, get_file, calls = self.publish(artifacts, folder), artifacts.store.get_file, list[str]()

        def miss_once(key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
            calls.append(key)
            if len(calls) == 1:
                raise ArtifactNotFoundError(key)
            get_file(key, path, digest, max_bytes=max_bytes)

        monkeypatch.setattr(artifacts.store, "get_file", miss_once)
        assert fetch_or_withdraw(artifacts, ref).is_dir()
        assert len(calls) == 3

    def test_what_arrives_otherwise_each_time_stays(
        self, artifacts: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref, get_file = self.publish(artifacts, folder), artifacts.store.get_file

        def garble(key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
            get_file(key, path, max_bytes=max_bytes)
            garbled = os.urandom(path.stat().st_size)
            path.write_bytes(garbled)
            assert digest is not None
            digest.update(garbled)

        with monkeypatch.context() as patch, pytest.raises(ChecksumMismatchError, match="other bytes each time"):
            patch.setattr(artifacts.store, "get_file", garble)
            fetch_or_withdraw(artifacts, ref)
        assert fetch_or_withdraw(artifacts, ref).is_dir()

    def test_what_arrived_damaged_once_is_fetched_again(
        self, artifacts: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref, get_file, calls = self.publish(artifacts, folder), artifacts.store.get_file, list[str]()

        def garble_once(key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
            get_file(key, path, digest, max_bytes=max_bytes)
            calls.append(key)
            if len(calls) == 1:
                path.write_bytes(b"!")

        monkeypatch.setattr(artifacts.store, "get_file", garble_once)
        copy = artifacts.fetch(ref)
        assert (copy / "model_index.json").read_text() == "{}"
        assert len(calls) == 3

    def test_an_object_larger_than_promised_is_not_taken(
        self, artifacts: ArtifactStore, folder: Path, tmp_path: Path
    ) -> None:
        ref = self.publish(artifacts, folder)
        lie = artifacts.manifest(ref).files[1]
        (tmp_path / "large").write_bytes(bytes(20 * 2**20))
        artifacts.store.put_file(lie.key, tmp_path / "large")
        with pytest.raises(ObjectTooLargeError, match=lie.key):
            artifacts.store.get_file(lie.key, tmp_path / "target", max_bytes=lie.size)
        assert not (tmp_path / "target").exists() and not list(tmp_path.glob(".tmp-*"))
        with pytest.raises(DamagedArtifactError, match="more than 4096 bytes"):
            artifacts.fetch(ref)

    def test_an_artifact_that_the_disk_cannot_hold_is_not_begun(self, artifacts: ArtifactStore, folder: Path) -> None:
        ref = self.publish(artifacts, folder)
        manifest = artifacts.manifest(ref)
        huge = replace(manifest, files=(replace(manifest.files[0], size=10**18), *manifest.files[1:]))
        artifacts.store.put_bytes(f"finetune/{DIGEST}/manifest.json", huge.to_json().encode())
        with pytest.raises(StoreUnavailableError, match=r"1000000000\.0 GB are needed.*DEME_HOME"):
            artifacts.fetch(ref)
        assert not [path for path in artifacts.cache.rglob("*") if path.is_file()]

    def test_a_lost_file_is_an_error(self, artifacts: ArtifactStore, folder: Path) -> None:
        ref = self.publish(artifacts, folder)
        lost = artifacts.manifest(ref).files[0].key
        artifacts.store.delete(lost)
        with pytest.raises(DamagedArtifactError, match=f"{lost} is lost"):
            artifacts.fetch(ref)

    def test_a_killed_upload_is_invisible_until_swept(
        self, artifacts: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die(*_: object, **__: object) -> bool:
            raise Killed

        whole = self.publish(artifacts, folder, digest="whole")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(artifacts.store, "put_bytes", die)
            self.publish(artifacts, folder)
        artifacts.store.put_bytes("foreign/object", b"not ours to sweep")
        assert artifacts.find("finetune", DIGEST) is None
        assert artifacts.list_refs("finetune") == [whole]
        assert len(keys(artifacts.store, f"finetune/{DIGEST}/")) == 2
        assert artifacts.sweep(timedelta(hours=1)) == 0
        assert artifacts.sweep(ANY_AGE) == 2
        assert keys(artifacts.store, f"finetune/{DIGEST}/") == []
        assert artifacts.store.exists("foreign/object")
        assert artifacts.fetch(whole).is_dir()

    def test_a_failed_upload_removes_its_files(
        self, artifacts: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put_file = artifacts.store.put_file

        def fail_on_weights(key: str, path: Path) -> None:
            if key.endswith("weights.safetensors"):
                raise Killed
            put_file(key, path)

        monkeypatch.setattr(artifacts.store, "put_file", fail_on_weights)
        with pytest.raises(Killed):
            self.publish(artifacts, folder)
        assert keys(artifacts.store) == []

    def test_one_publisher_wins_a_race(self, artifacts: ArtifactStore, tmp_path: Path) -> None:
        def publish(writer: int) -> ArtifactRef:
            folder = tmp_path / f"made-{writer}"
            folder.mkdir()
            (folder / "left").write_text(str(writer))
            (folder / "right").write_text(str(writer))
            return self.publish(artifacts, folder)

        refs = race(publish)
        assert len(set(refs)) == 1
        copy = artifacts.fetch(refs[0])
        assert (copy / "left").read_text() == (copy / "right").read_text()
        assert len(keys(artifacts.store)) == 3

    def test_a_retry_that_meets_its_own_manifest_has_won(
        self, artifacts: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put_bytes = artifacts.store.put_bytes

        def put_twice(key: str, data: bytes, *, if_absent: bool = False) -> bool:
            put_bytes(key, data, if_absent=if_absent)
            return put_bytes(key, data, if_absent=if_absent)

        monkeypatch.setattr(artifacts.store, "put_bytes", put_twice)
        assert artifacts.fetch(self.publish(artifacts, folder)).is_dir()

    def test_a_folder_that_was_taken_is_not_downloaded(self, artifacts: ArtifactStore, folder: Path) -> None:
        weights = (folder / "unet" / "weights.safetensors").read_bytes()
        ref = self.publish(artifacts, folder, take_folder=True)
        assert not folder.exists()
        self.delete_files(artifacts, ref)
        assert (artifacts.fetch(ref) / "unet" / "weights.safetensors").read_bytes() == weights

    @pytest.mark.parametrize("look_first", [True, False])
    def test_a_folder_that_came_too_late_is_not_taken(
        self, artifacts: ArtifactStore, folder: Path, look_first: bool
    ) -> None:
        first = self.publish(artifacts, folder)
        weights = (folder / "unet" / "weights.safetensors").read_bytes()
        (folder / "unet" / "weights.safetensors").write_bytes(b"other")
        assert self.publish(artifacts, folder, take_folder=True, look_first=look_first) == first
        assert (artifacts.fetch(first) / "unet" / "weights.safetensors").read_bytes() == weights

    def test_what_was_made_anew_replaces_every_copy(
        self, artifacts: ArtifactStore, folder: Path, tmp_path: Path
    ) -> None:
        """A manifest was removed by hand, and another machine made the artifact again, a little otherwise."""
        ref = self.publish(artifacts, folder)
        other = ArtifactStore(artifacts.store, tmp_path / "cache of another machine")
        other.fetch(ref), artifacts.fetch(ref)
        artifacts.store.delete(f"finetune/{DIGEST}/manifest.json")
        (folder / "unet" / "weights.safetensors").write_bytes(b"anew")
        assert self.publish(artifacts, folder, take_folder=True) == ref
        for each in (artifacts, other):
            assert (each.fetch(ref) / "unet" / "weights.safetensors").read_bytes() == b"anew"

    def test_many_fetch_at_once(self, artifacts: ArtifactStore, folder: Path) -> None:
        ref = self.publish(artifacts, folder)
        (copy,) = set(race(lambda _: artifacts.fetch(ref)))
        assert list(copy.parent.iterdir()) == [copy]

    def test_remove_forgets_store_and_cache(self, artifacts: ArtifactStore, folder: Path) -> None:
        kept, removed = self.publish(artifacts, folder, digest="kept"), self.publish(artifacts, folder)
        artifacts.fetch(removed)
        for _ in range(2):
            artifacts.remove(removed)
        assert artifacts.find("finetune", DIGEST) is None
        assert len(keys(artifacts.store)) == 3
        assert artifacts.fetch(kept).is_dir()
        with pytest.raises(ArtifactNotFoundError):
            artifacts.fetch(removed)

    def test_who_is_killed_while_removing_leaves_nothing_that_seems_whole(
        self, artifacts: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref, delete, deleted = self.publish(artifacts, folder), artifacts.store.delete, list[str]()

        def delete_once(key: str) -> None:
            if deleted:
                raise Killed
            deleted.append(key)
            delete(key)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(artifacts.store, "delete", delete_once)
            artifacts.remove(ref)
        assert artifacts.find("finetune", DIGEST) is None

    def test_checkpoints_are_counted_up(self, artifacts: ArtifactStore, folder: Path) -> None:
        stage = f"checkpoints/{DIGEST}"
        assert artifacts.newest(stage) is None
        for step in (200, 1000, 400):
            self.publish(artifacts, folder, stage, f"step-{step:08}")
        self.publish(artifacts, folder, f"checkpoints/{'e' * 64}", "step-00009999")
        refs = artifacts.list_refs(stage)
        assert [ref.digest for ref in refs] == ["step-00000200", "step-00000400", "step-00001000"]
        assert {ref.stage for ref in refs} == {stage}
        assert artifacts.newest(stage) == refs[-1]
        assert artifacts.list_refs("checkpoints") == []
        assert artifacts.sweep(ANY_AGE) == 0

    def test_a_manifest_of_another_artifact_is_refused(self, artifacts: ArtifactStore, folder: Path) -> None:
        manifest = replace(artifacts.manifest(self.publish(artifacts, folder)), digest="other", files=())
        artifacts.store.put_bytes(f"finetune/{DIGEST}/manifest.json", manifest.to_json().encode())
        with pytest.raises(ChecksumMismatchError, match=f"{DIGEST}/manifest.json"):
            artifacts.fetch(ArtifactRef(f"{artifacts.store.uri}/finetune/{DIGEST}", DIGEST))
