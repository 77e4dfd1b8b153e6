"""Data sets larger than a disk: the cache stays under its bound, and any batch can be resumed."""

import fcntl
import io
import itertools
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deme_core.errors import ArtifactNotFoundError, DatasetError, StoreUnavailableError
from deme_core.file_store import FileStore
from deme_core.images import ImageDataset, TrainingBatches, load_images, shard_cache, split_heldout, stream
from deme_core.images.draws import ShardWindows
from deme_core.images.inspection import inspect, verdict
from deme_core.images.opening import open_source
from deme_core.images.preview import preview_images
from deme_core.images.shard_cache import ShardCache
from deme_core.images.tars import TarSource
from deme_core.recipe import DatasetSpec
from deme_core.store import Digest
from tests.e2e.waiting import wait_for

NUM_TARS, PER_TAR, WINDOW = 10, 6, 2
TAR_BYTES = 20_480


def pack_tars(folder: Path) -> None:
    folder.mkdir()
    for number in range(NUM_TARS):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as archive:
            for index in range(PER_TAR):
                file = io.BytesIO()
                pixels = np.random.default_rng(number * PER_TAR + index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file, "png")
                for extension, content in (("png", file.getvalue()), ("txt", f"{number} {index}".encode())):
                    info = tarfile.TarInfo(f"{index}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bucket") / "tars"
    pack_tars(folder)
    assert {path.stat().st_size for path in folder.iterdir()} == {TAR_BYTES}
    return folder


def _spec(tars: Path, **settings: object) -> DatasetSpec:
    spec = {"source": "webdataset", "path": tars.as_uri(), "resolution": 8, "caption_column": "txt"}
    spec |= {"stream": True, "stream_window": WINDOW, "cache_gb": 3 * TAR_BYTES / 1e9, **settings}
    return DatasetSpec.model_validate(spec)


def _load(tars: Path, tmp_path: Path, **settings: object) -> ImageDataset:
    spec = _spec(tars, **settings)
    return load_images(spec, cache=tmp_path / "cache", index_store=FileStore(tmp_path / "index"))


def _batches(dataset: ImageDataset, start: int, stop: int) -> list[tuple[torch.Tensor, tuple[str, ...] | None]]:
    stream = TrainingBatches(
        dataset, batch_size=4, seed=7, random_crop=False, random_flip=True, caption_dropout=0.2, start_batch=start
    )
    return [(batch.clean_images, batch.captions) for batch in itertools.islice(stream, stop - start)]


def _cached_bytes(tmp_path: Path) -> int:
    total = 0
    for path in (tmp_path / "cache").rglob("*"):
        with suppress(FileNotFoundError):  # Other threads are at work.
            if path.is_file() and path.suffix != ".reserved":  # Which takes no block of the disk.
                total += path.stat().st_size
    return total


def test_images_captions_and_their_fingerprint_are_those_of_a_copy_on_disk(tars: Path, tmp_path: Path) -> None:
    streamed = _load(tars, tmp_path)
    local = _load(tars, tmp_path / "local", stream=False)
    assert streamed.example_fingerprint == local.example_fingerprint
    assert streamed.fingerprint != local.fingerprint  # Their order differs.
    assert streamed.captions == local.captions
    for index in (0, 17, NUM_TARS * PER_TAR - 1):
        assert torch.equal(streamed.image(index), local.image(index))


def test_a_stream_which_looks_at_its_images_itself_keeps_no_digests_of_them(tars: Path, tmp_path: Path) -> None:
    asked = {"num_images": None, "skip_broken": False, "channels": 3, "cache": tmp_path}
    streamed = _load(tars, tmp_path).stream
    assert streamed is not None
    on_disk = inspect(TarSource(sorted(tars.iterdir()), tars), **asked)
    found = inspect(streamed.source, **asked)
    assert (found.content, found.digests, len(on_disk.digests)) == (on_disk.content, b"", 32 * len(found.indices))


def test_names_that_are_not_utf8_are_streamed(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    (tmp_path / "tars").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / name)
    with tarfile.open(tmp_path / "tars" / "0.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(tmp_path / name, name)
    for _ in range(2):  # Once the index is made, then it is read.
        index = FileStore(tmp_path / "index")
        source = open_source(_spec(tmp_path / "tars"), tmp_path / "cache", index_store=index)
        assert [source.name(number) for number in range(len(source))] == [f"0.tar/{name}"]


def test_texts_that_are_not_utf8_are_refused_as_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    pack_tars(folder)
    with tarfile.open(folder / "000.tar", "a") as archive:
        for name, content in (("z.png", b"no image"), ("z.txt", "\u00e9t\u00e9".encode("latin-1"))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    settings = {"skip_broken": True, "cache_gb": 1e-3}
    assert len(_load(folder, tmp_path, caption_column=None, **settings)) == NUM_TARS * PER_TAR
    with pytest.raises(DatasetError, match=r"000\.tar/z\.txt is not UTF-8; pack the tar anew"):
        _load(folder, tmp_path, **settings)


def test_the_cache_stays_under_its_bound_while_epochs_pass_through_it(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    get_file = FileStore.get_file

    def watch(store: FileStore, key: str, path: Path, **bound: int) -> None:
        get_file(store, key, path, **bound)
        fetched.append(key)
        assert _cached_bytes(tmp_path) <= 3 * TAR_BYTES + 1000

    monkeypatch.setattr(FileStore, "get_file", watch)
    dataset = split_heldout(_load(tars, tmp_path), 6)[0]
    assert sorted(fetched) == [f"{number:03d}.tar" for number in range(NUM_TARS)]  # Each once, for the index.
    fetched.clear()
    per_epoch = len(dataset) / 4
    _batches(dataset, 0, round(3 * per_epoch))
    assert 2.5 * NUM_TARS <= len(fetched) <= 3.5 * NUM_TARS  # Once an epoch, not once an image.
    assert _cached_bytes(tmp_path) > 2 * TAR_BYTES


@pytest.mark.parametrize("reservation_left", [False, True])
def test_a_shard_that_arrives_while_room_is_made_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reservation_left: bool
) -> None:
    cache = ShardCache(FileStore(tmp_path / "store"), tmp_path / "cache", max_bytes=3)
    (tmp_path / "cache").mkdir()
    reservation = tmp_path / "cache" / "0-a.reserved"
    reservation.write_bytes(b"12")
    iterdir = Path.iterdir

    def arrive_after_listing(folder: Path) -> Iterator[Path]:
        listed = list(iterdir(folder))
        (folder / "a.shard").write_bytes(b"12")
        if not reservation_left:
            reservation.unlink()
        return iter(listed)

    monkeypatch.setattr(Path, "iterdir", arrive_after_listing)
    with reservation.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not cache._make_room(2)


def test_a_resumed_run_sees_the_very_same_batches(tars: Path, tmp_path: Path) -> None:
    dataset = split_heldout(_load(tars, tmp_path), 6)[0]
    expected = _batches(dataset, 0, 33)
    assert len({image.numpy().tobytes() for images, _ in expected[:13] for image in images}) > 45
    for start in (1, 12, 13, 14, 30):
        # Of another machine, which has the index from the store and nothing else.
        resumed = _batches(split_heldout(_load(tars, tmp_path / str(start)), 6)[0], start, 33)
        for (images, captions), (expected_images, expected_captions) in zip(resumed, expected[start:], strict=True):
            assert torch.equal(images, expected_images)
            assert captions == expected_captions


def test_the_index_is_made_once_for_all_machines(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _load(tars, tmp_path)
    monkeypatch.setattr(FileStore, "get_file", lambda *_, **__: pytest.fail("a tar was read"))
    spec_of_other = _load(tars, tmp_path, cache_gb=1)
    assert spec_of_other.fingerprint == first.fingerprint


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that are read, in whole or in part."""
    names: list[str] = []
    for method in ("get_file", "get_range"):
        original = getattr(FileStore, method)

        def note(store: FileStore, key: str, *args: Any, _original: Any = original, **bound: int) -> Any:
            names.append(key)
            return _original(store, key, *args, **bound)

        monkeypatch.setattr(FileStore, method, note)
    return names


@pytest.mark.parametrize(("num_images", "known"), [(None, None), (PER_TAR, PER_TAR), (PER_TAR + 1, None)])
def test_a_preview_reads_the_first_tar_only(
    tars: Path, tmp_path: Path, read: list[str], num_images: int | None, known: int | None
) -> None:
    assert preview_images(_spec(tars, num_images=num_images), tmp_path / "cache").num_images == known
    assert read == ["000.tar"]
    _load(tars, tmp_path, cache_gb=1)
    assert read.count("000.tar") == 1, "a run finds the copy"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "jpg"}, r"no images in the tar 000\.tar"),
        ({"caption_column": "title"}, r"'title' is not in the tar 000\.tar, which has txt"),
        ({"cache_gb": 1.5 * TAR_BYTES / 1e9}, "cache_gb must hold the 2 tars"),
    ],
)
def test_a_preview_of_what_cannot_be_used_reads_no_more(
    tars: Path, tmp_path: Path, read: list[str], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        preview_images(_spec(tars, **settings), tmp_path / "cache")
    assert set(read) <= {"000.tar"}


def test_an_order_is_a_permutation_that_reads_few_shards_at_a_time() -> None:
    shards = torch.arange(NUM_TARS).repeat_interleave(PER_TAR)[torch.randperm(NUM_TARS * PER_TAR)]
    windows = ShardWindows(shards, WINDOW)
    orders = [windows.order(1, epoch) for epoch in (0, 1)]
    assert not torch.equal(*orders)
    together = [{frozenset(row.tolist()) for row in shards[order].reshape(-1, WINDOW * PER_TAR)} for order in orders]
    assert together[0] != together[1], "shards are shuffled, too"
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(len(shards)))
        near = shards[order].reshape(-1, WINDOW * PER_TAR)
        assert all(len(row.unique()) == WINDOW for row in near)
        assert any((row[1:] < row[:-1]).any() for row in near)  # Mixed within a window.
    assert torch.equal(ShardWindows(shards, WINDOW).order(1, 0), orders[0])


@pytest.mark.parametrize("later_ns", [10**9, 0])
def test_a_tar_that_was_written_anew_in_the_same_size_has_new_captions(tmp_path: Path, later_ns: int) -> None:
    pack_tars(copy := tmp_path / "copy")
    captions = _load(copy, tmp_path).captions
    assert captions is not None and captions[0] == "0 0"
    tar = copy / "000.tar"
    time_ns = tar.stat().st_mtime_ns + later_ns
    tar.write_bytes(tar.read_bytes().replace(b"0 0" + bytes(509), b"9 9" + bytes(509)))
    os.utime(tar, ns=(time_ns, time_ns))
    assert _load(copy, tmp_path).captions == ["9 9", *captions[1:]]


def test_a_cache_that_cannot_hold_a_window_is_refused(tars: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cache_gb must hold the 2 tars"):
        _load(tars, tmp_path, cache_gb=1.5 * TAR_BYTES / 1e9)


def test_a_tar_that_changes_during_a_run_is_an_error(tars: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    pack_tars(copy)
    dataset = _load(copy, tmp_path)
    for path in (tmp_path / "cache").rglob("*.shard"):
        path.unlink()
    content = bytearray((copy / "004.tar").read_bytes())
    content[600:1000] = bytes(400)
    (copy / "004.tar").write_bytes(bytes(content))
    with pytest.raises(DatasetError, match="changed"):
        dataset.image(4 * PER_TAR)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_tar_that_goes_away_during_a_run_is_told_in_one_sentence(
    tars: Path, tmp_path: Path, num_workers: int
) -> None:
    shutil.copytree(tars, copy := tmp_path / "copy")
    dataset = _load(copy, tmp_path)
    shutil.rmtree(copy)
    shutil.rmtree(tmp_path / "cache")
    settings = {"batch_size": 4, "seed": 0, "random_crop": False, "random_flip": False, "num_workers": num_workers}
    with pytest.raises(ArtifactNotFoundError, match=r"^file:\S+\.tar is not in the object store; [^\n]+\.$"):
        next(iter(TrainingBatches(dataset, **settings)))


def test_jobs_that_share_a_small_cache_index_tars_side_by_side(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []

    def slowly(*image: Any) -> str:
        time.sleep(0.002)  # Long enough for the others to want the room.
        most.append(_cached_bytes(tmp_path))
        return verdict(*image)

    monkeypatch.setattr(stream, "verdict", slowly)
    monkeypatch.setattr(shard_cache, "_WAIT_SEC", 0.01)

    def load(number: int) -> str:
        spec = {"source": "webdataset", "path": tars.as_uri(), "resolution": 8, "stream": True, "stream_window": 1}
        spec["cache_gb"] = 1.5 * TAR_BYTES / 1e9
        index = FileStore(tmp_path / f"index-{number}")  # None finds what another one read.
        return load_images(DatasetSpec.model_validate(spec), cache=tmp_path / "cache", index_store=index).fingerprint

    with ThreadPoolExecutor(3) as executor:
        fingerprints = list(executor.map(load, range(3)))
    assert len(set(fingerprints)) == 1
    assert max(most) <= 1.5 * TAR_BYTES


def test_a_tar_that_is_being_read_is_not_pushed_out_and_survives_a_deleted_cache(tars: Path, tmp_path: Path) -> None:
    store = FileStore(tars)
    shards = sorted(store.list(""), key=lambda shard: shard.key)
    cache = ShardCache(store, tmp_path / "shards", 2 * TAR_BYTES)
    with cache.reading(shards[0]) as file:
        cache.fetch(shards[1:2])
        cache.fetch(shards[2:3])
        assert [cache.path(shard).exists() for shard in shards[:3]] == [True, False, True]
        shutil.rmtree(tmp_path / "shards")
        assert file.read() == (tars / shards[0].key).read_bytes()


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600] ^= 1  # In the image of the first sample, which follows its header.
    path.write_bytes(bytes(content))


def _cut(path: Path) -> None:
    os.truncate(path, 1000)


@pytest.mark.parametrize("harm", [_damage, _cut])
def test_a_copy_that_was_damaged_is_brought_again(tars: Path, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    dataset = _load(tars, tmp_path, cache_gb=1)
    copies = list((tmp_path / "cache").rglob("*.shard"))
    assert len(copies) == NUM_TARS
    for path in copies:
        harm(path)
    again = _load(tars, tmp_path, cache_gb=1)
    expected = _load(tars, tmp_path / "other")
    for index in range(len(dataset)):
        assert torch.equal(again.image(index), expected.image(index))
    _batches(again, 0, 2 * len(again) // 4)
    assert sorted(map(Path.read_bytes, copies)) == sorted(map(Path.read_bytes, tars.iterdir()))


def test_a_copy_that_is_no_tar_is_not_kept(tars: Path, tmp_path: Path) -> None:
    _load(tars, tmp_path, cache_gb=1)
    for path in (tmp_path / "cache").rglob("*.shard"):
        path.write_bytes(b"x" * TAR_BYTES)
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(DatasetError, match=r"Cannot read the tar \d{3}\.tar \(it is damaged"):
        _load(tars, tmp_path, cache_gb=1)
    assert len(list((tmp_path / "cache").rglob("*.shard"))) == NUM_TARS - 1


def test_a_download_that_is_not_of_the_size_listed_is_repeated_once(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tars)
    shard = next(iter(store.list("")))
    cache, get_file, num_cut = ShardCache(store, tmp_path / "shards", TAR_BYTES), store.get_file, 1

    def cut_first(key: str, path: Path, **bound: int) -> None:
        nonlocal num_cut
        get_file(key, path, **bound)
        if num_cut:
            num_cut -= 1
            _cut(path)

    monkeypatch.setattr(store, "get_file", cut_first)
    cache.fetch([shard])
    assert cache.path(shard).stat().st_size == TAR_BYTES
    cache.discard(shard)
    num_cut = 2
    with pytest.raises(DatasetError, match="changed"):
        cache.fetch([shard])
    with pytest.raises(DatasetError, match="changed"):
        cache.fetch([replace(shard, size=TAR_BYTES - 1)])
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [".lock"]


def test_an_index_that_is_wrong_is_made_anew_by_the_next_run(tars: Path, tmp_path: Path) -> None:
    """As of a tar that was damaged on its way when it was indexed."""
    expected = _load(tars, tmp_path).image(0)
    found = list((tmp_path / "index" / "stream-index").iterdir())
    (wrong,) = [path for path in found if '"0 0"' in path.read_text()]
    rows = json.loads(wrong.read_text())
    wrong.write_text(json.dumps([rows[0] | {"verdict": "0" * 64}, *rows[1:]]))
    with pytest.raises(DatasetError, match="run again"):
        _load(tars, tmp_path).image(0)
    assert torch.equal(_load(tars, tmp_path).image(0), expected)


def test_a_disk_without_room_for_a_tar_is_named(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=TAR_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(StoreUnavailableError, match="free space"):
        _load(tars, tmp_path)


class StuckStore(FileStore):
    """Its downloads stay half done."""

    def get_file(self, key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
        path.write_bytes(bytes(max_bytes // 2))
        time.sleep(60)


def _in_a_thread(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_bytes_that_a_dead_process_had_reserved_are_free(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "_WAIT_SEC", 0.01)
    store = FileStore(tars)
    shards = sorted(store.list(""), key=lambda shard: shard.key)
    folder = tmp_path / "shards"
    stuck = ShardCache(StuckStore(tars), folder, TAR_BYTES)
    # Spawned, not forked: whatever locks threads of other tests hold would stay held in it.
    killed = multiprocessing.get_context("spawn").Process(target=stuck.fetch, args=(shards[:1],))
    killed.start()
    wait_for(lambda: list(folder.glob(".tmp-*")))
    cache = ShardCache(store, folder, TAR_BYTES)
    waiting = _in_a_thread(lambda: cache.fetch(shards[:1]))
    waiting.join(0.3)
    assert waiting.is_alive(), "the process lives"
    killed.kill()
    killed.join()
    waiting.join(30)
    assert not waiting.is_alive()
    # As of a dead process whose id another one has now.
    (folder / f"{os.getpid()}-0.reserved").write_bytes(bytes(TAR_BYTES))
    other = _in_a_thread(lambda: cache.fetch(shards[1:2]))
    other.join(30)
    assert not other.is_alive()
    assert sorted(folder.iterdir()) == sorted([folder / ".lock", cache.path(shards[1])])
    with pytest.raises(DatasetError, match="cache_gb"):
        ShardCache(store, folder, TAR_BYTES - 1).fetch(shards[2:3])
