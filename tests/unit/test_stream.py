"""Data sets larger than a disk: the cache stays under its bound, and any batch can be resumed."""

import io
import itertools
import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deme_core.errors import DatasetError
from deme_core.images import ImageDataset, TrainingBatches, load_images, split_heldout
from deme_core.images.draws import ShardWindows
from deme_core.images.shard_cache import ShardCache
from deme_core.recipe import DatasetSpec
from deme_core.store import FileStore

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


def _load(tars: Path, tmp_path: Path, **settings: object) -> ImageDataset:
    spec = {"source": "webdataset", "path": tars.as_uri(), "resolution": 8, "caption_column": "txt"}
    spec |= {"stream": True, "stream_window": WINDOW, "cache_gb": 3 * TAR_BYTES / 1e9, **settings}
    return load_images(
        DatasetSpec.model_validate(spec), cache=tmp_path / "cache", index_store=FileStore(tmp_path / "index")
    )


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


def test_the_cache_stays_under_its_bound_while_epochs_pass_through_it(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    get_file = FileStore.get_file

    def watch(store: FileStore, key: str, path: Path) -> None:
        get_file(store, key, path)
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
    reservation = tmp_path / "cache" / f"{os.getpid()}-a.reserved"
    reservation.write_bytes(b"12")
    iterdir = Path.iterdir

    def arrive_after_listing(folder: Path) -> Iterator[Path]:
        listed = list(iterdir(folder))
        (folder / "a.shard").write_bytes(b"12")
        if not reservation_left:
            reservation.unlink()
        return iter(listed)

    monkeypatch.setattr(Path, "iterdir", arrive_after_listing)
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
    monkeypatch.setattr(FileStore, "get_file", lambda *_: pytest.fail("a tar was read"))
    spec_of_other = _load(tars, tmp_path, cache_gb=1)
    assert spec_of_other.fingerprint == first.fingerprint


def test_an_order_is_a_permutation_that_reads_few_shards_at_a_time() -> None:
    shards = torch.arange(NUM_TARS).repeat_interleave(PER_TAR)[torch.randperm(NUM_TARS * PER_TAR)]
    windows = ShardWindows(shards, WINDOW)
    orders = [windows.order(1, epoch) for epoch in (0, 1)]
    assert not torch.equal(*orders)
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(len(shards)))
        near = shards[order].reshape(-1, WINDOW * PER_TAR)
        assert all(len(row.unique()) == WINDOW for row in near)
        assert any((row[1:] < row[:-1]).any() for row in near)  # Mixed within a window.
    assert torch.equal(ShardWindows(shards, WINDOW).order(1, 0), orders[0])


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


def test_bytes_that_a_dead_process_had_reserved_are_free(tars: Path, tmp_path: Path) -> None:
    store = FileStore(tars)
    shards = sorted(store.list(""), key=lambda shard: shard.key)
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "999999999-0.reserved").write_bytes(bytes(TAR_BYTES))
    cache = ShardCache(store, folder, TAR_BYTES)
    cache.fetch(shards[:1])
    cache.fetch(shards[1:2])
    assert [cache.path(shard).exists() for shard in shards[:2]] == [False, True]
    with pytest.raises(DatasetError, match="cache_gb"):
        ShardCache(store, folder, TAR_BYTES - 1).fetch(shards[2:3])
