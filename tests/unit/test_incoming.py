from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deme_core.incoming import CLAIM_LASTS, Folder, Ledger, find_folders, why_unfinished
from deme_core.store import FileStore

NOW = datetime(2026, 11, 23, tzinfo=UTC)
LATER = datetime.now(UTC) + timedelta(days=1)
PIPELINE = {
    "model_index.json": b"{}",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"weights",
    "scheduler/scheduler_config.json": b"{}",
}
FLAT = {
    "config.json": b"{}",
    "diffusion_pytorch_model.safetensors": b"weights",
    "scheduler_config.json": b"{}",
}
SHARDS = b'{"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}'


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def upload(store: FileStore, path: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        store.put_bytes(f"{path}/{name}" if path else name, content)


def only(store: FileStore) -> Folder:
    [folder] = find_folders(store)
    return folder


@pytest.mark.parametrize("files", [PIPELINE, FLAT])
@pytest.mark.parametrize("path", ["", "new", "2026/november/a"])
def test_both_layouts_are_found_once(store: FileStore, files: dict[str, bytes], path: str) -> None:
    upload(store, path, files)
    folder = only(store)
    assert (folder.path, folder.names()) == (path, set(files))
    assert why_unfinished(store, folder, settled_before=LATER) is None


def test_what_is_no_model_is_no_folder(store: FileStore) -> None:
    upload(store, "notes", {"readme.txt": b"", "config.json": b"{}"})
    assert find_folders(store) == []


def test_folders_do_not_share_files(store: FileStore) -> None:
    upload(store, "a", PIPELINE)
    upload(store, "ab", FLAT)
    assert [folder.path for folder in find_folders(store)] == ["a", "ab"]
    assert [len(folder.objects) for folder in find_folders(store)] == [len(PIPELINE), len(FLAT)]


@pytest.mark.parametrize("missing", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_missing_file_is_named(store: FileStore, missing: str) -> None:
    upload(store, "new", {name: content for name, content in PIPELINE.items() if name != missing})
    assert why_unfinished(store, only(store), settled_before=LATER) == f"{missing} is missing"


def test_a_shard_that_the_index_names_is_waited_for(store: FileStore) -> None:
    files = {name: content for name, content in PIPELINE.items() if "safetensors" not in name}
    upload(store, "new", files | {"unet/diffusion_pytorch_model.safetensors.index.json": SHARDS})
    upload(store, "new", {"unet/part-1.safetensors": b""})
    assert why_unfinished(store, only(store), settled_before=LATER) == "unet/part-2.safetensors is missing"
    upload(store, "new", {"unet/part-2.safetensors": b""})
    assert why_unfinished(store, only(store), settled_before=LATER) is None


def test_a_folder_that_just_changed_is_left_alone(store: FileStore) -> None:
    upload(store, "new", PIPELINE)
    unfinished = why_unfinished(store, only(store), settled_before=datetime.now(UTC) - timedelta(minutes=1))
    assert unfinished is not None
    assert unfinished.startswith("it changed at")


def test_pickled_weights_are_not_waited_for(store: FileStore) -> None:
    files = {name: content for name, content in FLAT.items() if "safetensors" not in name}
    upload(store, "new", files | {"diffusion_pytorch_model.bin": b""})
    assert why_unfinished(store, only(store), settled_before=LATER) is None


def test_a_changed_folder_is_read_again_and_an_unchanged_one_is_not(store: FileStore, tmp_path: Path) -> None:
    ledger = Ledger(FileStore(tmp_path / "own"), ["prefix", "recipe"])
    upload(store, "new", PIPELINE)
    folder = only(FileStore(tmp_path / "new"))
    ledger.note(folder, {"broken": "truncated"})
    assert (ledger.outcome(folder) or {})["broken"] == "truncated"
    store.put_bytes("new/unet/diffusion_pytorch_model.safetensors", b"longer weights")
    assert ledger.outcome(only(FileStore(tmp_path / "new"))) is None


def test_of_many_watchers_at_once_one_starts_the_run(store: FileStore) -> None:
    ledger = Ledger(store, ["prefix"])
    with ThreadPoolExecutor(8) as executor:
        won = list(executor.map(lambda owner: ledger.claim("d" * 64, str(owner), NOW), range(8)))
    assert sum(won) == 1


def test_what_was_started_is_never_started_again(store: FileStore) -> None:
    ledger = Ledger(store, ["prefix"])
    assert ledger.claim("d" * 64, "a", NOW)
    ledger.started("d" * 64, "run")
    assert not ledger.claim("d" * 64, "b", NOW + 10 * CLAIM_LASTS)
    assert list(ledger.starts()) == ["d" * 64]


def test_the_claim_of_a_watcher_that_died_is_taken_over(store: FileStore) -> None:
    ledger = Ledger(store, ["prefix"])
    assert ledger.claim("d" * 64, "dies", NOW)
    assert not ledger.claim("d" * 64, "b", NOW + CLAIM_LASTS / 2)
    assert ledger.claim("d" * 64, "b", NOW + CLAIM_LASTS)
    assert not ledger.claim("d" * 64, "c", NOW + CLAIM_LASTS * 1.5)


def test_another_recipe_is_another_watch(store: FileStore) -> None:
    assert Ledger(store, ["prefix", "one"]).claim("d" * 64, "a", NOW)
    assert Ledger(store, ["prefix", "two"]).claim("d" * 64, "a", NOW)
