import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deme_core.checkpoint import save_tensors
from deme_core.checkpoint_watch import parts
from deme_core.checkpoint_watch.ledger import CLAIM_EXPIRES_AFTER, Ledger
from deme_core.checkpoint_watch.look import Finding, look, open_prefix
from deme_core.errors import ChecksumMismatchError, DemeError, InputError, StoreUnavailableError
from deme_core.file_store import FileStore
from deme_core.model_digest import model_digest
from deme_core.model_folder import WEIGHTS_NAME, load_denoiser, open_model_folder
from deme_core.store import Digest, StoredObject
from tests.tiny_models import one_level_unet, randomize, write_tiny_folder
from tests.tiny_pipelines import save_pipeline
from tests.unit.test_model_folder import flatten, pickle_weights, shard

CONFIG = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
SETTLE = timedelta(minutes=1)
HOUR_SEC = 3600.0


class CountingStore(FileStore):
    """Counts what a look costs."""

    def __init__(self, location: Path) -> None:
        super().__init__(location)
        self.calls: Counter[str] = Counter()

    def list(self, prefix: str) -> Iterator[StoredObject]:
        self.calls["list"] += 1
        return super().list(prefix)

    def get_file(self, key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
        self.calls["get_file"] += 1
        super().get_file(key, path, digest, max_bytes=max_bytes)

    def get_bytes(self, key: str) -> bytes:
        self.calls["get_bytes"] += 1
        return super().get_bytes(key)


class Watched:
    """A folder that is watched, and the ledger of the watch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.own = folder / "inbox", folder / "home", FileStore(folder / "own")
        self.folder.mkdir()
        self.started: list[str] = []

    def add(self, name: str, *, seed: int = 0, age_sec: float = HOUR_SEC) -> Path:
        """Writes a model folder of that age."""
        path = write_tiny_folder(self.folder / name, randomize(one_level_unet(), seed=seed), **CONFIG)
        return self.date(path, age_sec)

    def date(self, path: Path, age_sec: float = HOUR_SEC) -> Path:
        for file in path.rglob("*"):
            os.utime(file, (time.time() - age_sec,) * 2)
        return path

    def ledger(self) -> Ledger:
        return Ledger(self.own, prefix=self.folder.as_uri(), recipe="digits")

    def look(self, source: FileStore | None = None) -> dict[str, Finding]:
        """Looks once; returns findings by path below the prefix."""
        findings = look(source or FileStore(self.folder), self.ledger(), settle=SETTLE, home=self.home)
        return {finding.look.uri.removeprefix(self.folder.as_uri()).strip("/"): finding for finding in findings}

    def look_and_start(self) -> list[str]:
        """Looks once, starts what is new, and returns the folders for which runs were started."""
        book, before = self.ledger(), len(self.started)
        looks = [finding.look for finding in look(FileStore(self.folder), book, settle=SETTLE, home=self.home)]
        for index, seen in enumerate(looks):
            if seen.verdict.outcome == "whole":
                looks[index], _ = book.start_once(seen, lambda uri=seen.uri: self._start(uri), claimed_by="test")
        book.remember(looks)
        return self.started[before:]

    def _start(self, uri: str) -> str:
        self.started.append(uri.rpartition("/")[2])
        return f"run {len(self.started)}"

    def reason(self, outcome: str) -> str:
        """Looks at the one folder there is and returns why it is so."""
        [finding] = self.look().values()
        assert finding.look.verdict.outcome == outcome
        return str(finding.look.verdict.reason)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


@pytest.mark.parametrize("change", [lambda path: path, flatten, lambda path: shard_tiny(path)])
@pytest.mark.parametrize("name", ["", "a", "2026/november/ünï code"])
def test_every_layout_has_the_digest_that_the_import_gives(
    watched: Watched, change: Callable[[Path], Any], name: str
) -> None:
    path = watched.add(name)
    expected = model_digest(load_denoiser(open_model_folder(path)))
    change(path)
    watched.date(watched.folder)
    [finding] = watched.look().values()
    assert (finding.look.verdict.outcome, finding.look.verdict.digest) == ("whole", expected)
    assert finding.is_new
    assert FileStore(finding.look.uri).folder == path
    assert not list((watched.home / "scratch").iterdir())


def shard_tiny(path: Path) -> None:
    """Replaces the weights by two shards and an index."""
    tensors = open_model_folder(path).checkpoint().tensors()
    shard(path)  # Of another model; only its index matters.
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_tensors(path / "unet" / file, {name: tensors[name].clone() for name in held})
    (path / "unet" / f"{WEIGHTS_NAME}.index.json").write_text(
        str({"weight_map": {name: file for file, held in parts.items() for name in held}}).replace("'", '"')
    )


def test_the_name_of_the_weights_is_that_of_model_folder() -> None:
    assert parts.WEIGHTS_NAME == WEIGHTS_NAME


def test_looking_imports_no_torch() -> None:
    code = "import sys, deme_core.checkpoint_watch.look; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "DiTPipeline", "StableDiffusion3Pipeline"])
def test_a_whole_pipeline_has_the_digest_of_its_denoiser(name: str, watched: Watched) -> None:
    path = save_pipeline(name, watched.folder / "model")
    expected = model_digest(load_denoiser(open_model_folder(path)))
    watched.date(watched.folder)
    source = CountingStore(watched.folder)
    [finding] = watched.look(source).values()
    assert (finding.look.verdict.outcome, finding.look.verdict.digest) == ("whole", expected)
    # Index, two configs and the denoiser's weights: a text encoder can be larger than all of these.
    assert source.calls["get_file"] == 4


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("vae/config.json", "vae/config.json is missing, which model_index.json names"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors is missing"),
        ("text_encoder/model.safetensors", "text_encoder/model.safetensors is missing"),
        ("tokenizer", "tokenizer is missing, which model_index.json names"),
        ("transformer/config.json", "transformer/config.json is missing"),
    ],
)
def test_a_pipeline_waits_for_all_of_its_parts(missing: str, reason: str, watched: Watched) -> None:
    path = save_pipeline("PixArtAlphaPipeline", watched.folder / "model")
    if (path / missing).is_dir():
        shutil.rmtree(path / missing)
    else:
        (path / missing).unlink()
    watched.date(watched.folder)
    assert watched.reason("waiting") == reason


def test_a_pickled_text_encoder_is_broken(watched: Watched) -> None:
    path = save_pipeline("PixArtAlphaPipeline", watched.folder / "model")
    (path / "text_encoder" / "model.safetensors").rename(path / "text_encoder" / "pytorch_model.bin")
    watched.date(watched.folder)
    assert "text_encoder/pytorch_model.bin is pickled" in watched.reason("broken")


@pytest.mark.parametrize("name", ["unet/config.json", f"unet/{WEIGHTS_NAME}", "scheduler/scheduler_config.json"])
def test_a_folder_waits_for_a_missing_file_and_is_then_whole(watched: Watched, tmp_path: Path, name: str) -> None:
    path = watched.add("a")
    (path / name).rename(tmp_path / "late")
    for _ in range(2):
        assert watched.reason("waiting") == f"{name} is missing"
    (tmp_path / "late").rename(path / name)
    assert watched.reason("waiting").startswith("it changed")
    make_older(watched)
    assert watched.look()["a"].is_new


def make_older(watched: Watched) -> None:
    """Makes the last look one of an hour ago."""
    book = watched.ledger()
    hour = timedelta(seconds=HOUR_SEC)
    book.remember([replace(seen, since=seen.since - hour) for seen in book.last_look.values()])


def test_a_folder_waits_for_a_shard_that_the_index_names(watched: Watched) -> None:
    path = watched.add("a")
    shard_tiny(path)
    (path / "unet" / "b.safetensors").unlink()
    watched.date(path)
    assert watched.reason("waiting").startswith("unet/b.safetensors is missing")


def test_a_fresh_folder_waits_and_is_not_read(watched: Watched) -> None:
    watched.add("a", age_sec=5.0)
    source = CountingStore(watched.folder)
    assert watched.look(source)["a"].look.verdict.outcome == "waiting"
    assert source.calls == {"list": 1}
    watched.date(watched.folder / "a")
    assert watched.reason("waiting").startswith("it changed"), "times changed since the last look"


def test_a_change_that_keeps_old_times_waits(watched: Watched) -> None:
    path = watched.add("a", age_sec=5.0)
    watched.look()
    with (path / "unet" / WEIGHTS_NAME).open("ab") as file:
        file.write(b"more")
    watched.date(path)
    assert watched.reason("waiting").startswith("it changed")
    assert watched.reason("waiting").startswith("it changed"), "two looks within a moment prove nothing"


def test_times_in_the_future_do_not_make_a_folder_wait_for_ever(watched: Watched) -> None:
    watched.add("a", age_sec=-24 * HOUR_SEC)
    watched.reason("waiting")
    make_older(watched)
    assert watched.look()["a"].look.verdict.outcome == "whole"


class GrowingStore(FileStore):
    """A file grows while the folder is downloaded."""

    def get_file(self, key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
        super().get_file(key, path, digest, max_bytes=max_bytes)
        if key.endswith(WEIGHTS_NAME):
            with (self.folder / key).open("ab") as file:
                file.write(b"more")


class VanishingStore(FileStore):
    """The folder goes away before it is read."""

    def get_file(self, key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
        shutil.rmtree(self.folder / "a", ignore_errors=True)
        super().get_file(key, path, digest, max_bytes=max_bytes)


@pytest.mark.parametrize("store", [GrowingStore, VanishingStore])
def test_a_change_during_the_download_waits(watched: Watched, store: type[FileStore]) -> None:
    watched.add("a")
    assert watched.look(store(watched.folder))["a"].look.verdict.outcome == "waiting"


class DamagingStore(FileStore):
    """What is read of the first folder is not what was stored, as the server's checksums show."""

    def get_file(self, key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
        if key.startswith("a/"):
            raise ChecksumMismatchError(f"{key} is not what was stored.")
        super().get_file(key, path, digest, max_bytes=max_bytes)


def test_a_folder_that_is_damaged_on_its_way_waits_and_stops_no_other(watched: Watched) -> None:
    watched.add("a")
    watched.add("b", seed=1)
    found = watched.look(DamagingStore(watched.folder))
    assert [found[name].look.verdict.outcome for name in "ab"] == ["waiting", "whole"]
    assert watched.look()["a"].look.verdict.outcome == "whole"


class SwellingStore(FileStore):
    """The weights become larger than they were listed, before they are read."""

    def get_file(self, key: str, path: Path, digest: Digest | None = None, *, max_bytes: int) -> None:
        if key.endswith(WEIGHTS_NAME):
            os.truncate(self.folder / key, 10**10)  # A hole, which takes no space.
        super().get_file(key, path, digest, max_bytes=max_bytes)
        assert path.stat().st_size < 10**6


def test_no_file_is_read_beyond_its_listed_size(watched: Watched) -> None:
    watched.add("a")
    assert watched.look(SwellingStore(watched.folder))["a"].look.verdict.outcome == "waiting"


@pytest.mark.parametrize(
    ("name", "size", "outcome", "reason"),
    [
        (f"unet/{WEIGHTS_NAME}", 10**12, "waiting", "it takes 1000.0 GB, and"),
        ("unet/config.json", 10**9, "broken", "unet/config.json holds 1000000000 bytes, which is no config"),
        ("model_index.json", 10**9, "broken", "model_index.json holds 1000000000 bytes, which is no config"),
    ],
)
def test_a_huge_file_is_not_read_and_stops_no_other_folder(
    watched: Watched, name: str, size: int, outcome: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**11))
    watched.add("b", seed=1)
    os.truncate(watched.add("a") / name, size)  # A hole, which takes no space.
    watched.date(watched.folder / "a")
    found = watched.look()
    assert found["b"].look.verdict.outcome == "whole"
    assert found["a"].look.verdict.outcome == outcome
    assert str(found["a"].look.verdict.reason).startswith(reason)


def test_an_index_with_an_empty_part_stops_no_look(watched: Watched) -> None:
    path = watched.add("a")
    replace_text("model_index.json", "{", '{"vae": [], ')(path)
    watched.date(path)
    assert watched.look()["a"].look.verdict.outcome == "whole"


def truncate(path: Path) -> None:
    weights = path / "unet" / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-100])


def replace_text(name: str, old: str, new: str) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        text = (path / name).read_text()
        assert old in text
        (path / name).write_text(text.replace(old, new))

    return change


def be_another_pipeline(path: Path) -> None:
    (path / "unet").rename(path / "transformer")
    replace_text("model_index.json", '"unet"', '"transformer"')(path)


def drop_tensor(path: Path) -> None:
    weights = path / "unet" / WEIGHTS_NAME
    tensors = {name: t.clone() for name, t in open_model_folder(path).checkpoint().tensors().items()}
    del tensors["conv_in.weight"]
    save_tensors(weights, tensors)


def be_of_unknown_type(path: Path) -> None:
    header = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (path / "unet" / WEIGHTS_NAME).write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, f"unet/{WEIGHTS_NAME} is not a whole safetensors file"),
    "pickled": (pickle_weights, "is pickled, which can run code"),
    "no JSON": (replace_text("unet/config.json", "{", ""), "unet/config.json is not valid JSON"),
    "other shapes": (replace_text("unet/config.json", '"out_channels": 1', '"out_channels": 2'), "mis-shaped tensors"),
    "unknown type": (be_of_unknown_type, "Tensor a is of type F6_E2M3"),
    "missing tensor": (drop_tensor, "missing tensors: conv_in.weight"),
    "impossible config": (replace_text("unet/config.json", "DownBlock2D", "NoBlock"), "configs describe no model"),
    "other class": (replace_text("unet/config.json", "UNet2DModel", "VQModel"), "describes a VQModel"),
    "no timesteps": (replace_text("scheduler/scheduler_config.json", "1000", '"many"'), "num_train_timesteps 'many'"),
    "other pipeline": (be_another_pipeline, "it holds no unet, which a DDPMPipeline needs"),
}


def test_a_link_that_leads_out_of_the_prefix_stops_no_look_at_others(watched: Watched, tmp_path: Path) -> None:
    elsewhere = tmp_path / "config.json"
    (watched.add("a") / "unet" / "config.json").rename(elsewhere)
    (watched.folder / "a" / "unet" / "config.json").symlink_to(elsewhere)
    watched.date(watched.add("b"))
    outcomes = {name: finding.look.verdict.outcome for name, finding in watched.look().items()}
    assert outcomes == {"a": "waiting", "b": "whole"}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_broken_folder_is_reported_once(
    watched: Watched, damage: Callable[[Path], Any], sentence: str, tmp_path: Path
) -> None:
    path = watched.add("a")
    damage(path)
    watched.date(path)
    first, second = watched.look()["a"], watched.look()["a"]
    assert first.look.verdict.outcome == "broken"
    assert sentence in str(first.look.verdict.reason)
    assert (first.is_new, second.is_new) == (True, False)
    assert str(tmp_path) not in str(first.look.verdict.reason) and "\n" not in str(first.look.verdict.reason)
    assert first.look == second.look


def test_a_mended_folder_is_read_again(watched: Watched) -> None:
    truncate(watched.add("a"))
    watched.date(watched.folder)
    assert watched.look()["a"].look.verdict.outcome == "broken"
    watched.add("a")
    watched.look()
    make_older(watched)
    assert watched.look()["a"].look.verdict.outcome == "whole"


def test_weights_start_one_run_whatever_the_folder_is_called(watched: Watched) -> None:
    watched.add("a", seed=1)
    watched.add("b", seed=1)
    watched.add("c", seed=2)
    assert watched.look_and_start() == ["a", "c"]
    (watched.folder / "a").rename(watched.folder / "z")
    watched.add("later", seed=1)
    assert watched.look_and_start() == []


def test_each_recipe_starts_a_run_of_its_own_for_the_same_weights(watched: Watched) -> None:
    watched.add("a")
    [finding] = watched.look().values()
    for recipe, expected in (("digits", True), ("cifar10", True), ("digits", False)):
        ledger = Ledger(watched.own, prefix=watched.folder.as_uri(), recipe=recipe)
        assert ledger.start_once(finding.look, lambda: "run", claimed_by="test")[1] is expected


@pytest.mark.parametrize("change", [lambda text: text + "\n", str.swapcase], ids=["grew", "same size"])
def test_a_file_that_changed_and_kept_its_time_is_read_again(watched: Watched, change: Callable[[str], str]) -> None:
    index = watched.add("a") / "model_index.json"
    [before], time_ns = watched.look().values(), index.stat().st_mtime_ns
    index.write_text(change(index.read_text()))
    os.utime(index, ns=(time_ns, time_ns))
    [after] = watched.look().values()
    assert after.look.fingerprint != before.look.fingerprint


def test_a_look_at_nothing_new_costs_one_listing_and_no_download(watched: Watched) -> None:
    watched.add("whole")
    truncate(watched.add("broken", seed=1))
    watched.date(watched.folder)
    watched.look_and_start()
    source = CountingStore(watched.folder)
    ledger_store = watched.own = CountingStore(watched.own.folder)
    before = sorted((path, path.stat().st_mtime_ns) for path in watched.own.folder.rglob("*"))
    for finding in watched.look(source).values():
        if finding.look.verdict.outcome == "whole":
            watched.ledger().start_once(finding.look, lambda: pytest.fail("started again"), claimed_by="test")
    assert source.calls == {"list": 1}
    assert ledger_store.calls["get_bytes"] == 1, "the last look"
    assert sorted((path, path.stat().st_mtime_ns) for path in watched.own.folder.rglob("*")) == before


def test_of_watchers_at_once_one_starts_the_run_and_one_reports(watched: Watched) -> None:
    watched.add("a")
    [finding] = watched.look().values()
    shutil.rmtree(watched.own.folder)
    barrier, started = Barrier(8), []

    def watch(number: int) -> tuple[bool, bool]:
        book = watched.ledger()
        assert book.find_look(finding.look.uri, finding.look.fingerprint) is None
        barrier.wait()
        is_new = book.add_look(finding.look)
        return is_new, book.start_once(finding.look, lambda: started.append(number) or "run", claimed_by="test")[1]

    with ThreadPoolExecutor(8) as executor:
        told = list(executor.map(watch, range(8)))
    assert len(started) == sum(is_new for is_new, _ in told) == sum(did for _, did in told) == 1


def crash() -> str:
    raise KeyboardInterrupt


def test_a_claim_without_a_run_is_taken_over_after_a_while(watched: Watched) -> None:
    watched.add("a")
    [finding] = watched.look().values()
    with pytest.raises(KeyboardInterrupt):
        watched.ledger().start_once(finding.look, crash, claimed_by="dies")
    assert watched.look_and_start() == [], "its owner may still be at it"
    [claim] = watched.own.folder.rglob("starts/*.json")
    assert '"dies"' in claim.read_text() and '"claimed_at"' in claim.read_text()
    os.utime(claim, (time.time() - CLAIM_EXPIRES_AFTER.total_seconds() - 5,) * 2)
    assert watched.look_and_start() == ["a"]
    assert '"flow_run_id": "run 1"' in claim.read_text()
    assert watched.look_and_start() == []


def test_a_completed_start_outlives_everything_else(watched: Watched) -> None:
    watched.add("a")
    watched.look_and_start()
    for path in watched.own.folder.rglob("last-look.json"):
        path.unlink()
    assert watched.look_and_start() == []
    for path in watched.own.folder.rglob("looks/*.json"):
        path.unlink()
    assert watched.look_and_start() == []


def test_a_forgotten_start_is_made_again(watched: Watched) -> None:
    watched.add("a")
    watched.look_and_start()
    for path in watched.own.folder.rglob("starts/*.json"):
        path.unlink()
    assert watched.look_and_start() == ["a"]


def test_a_write_repeated_after_a_lost_answer_still_starts(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.add("a")
    put = FileStore.put_bytes

    def lose_answer(self: FileStore, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        put(self, key, data, if_absent=if_absent)
        return put(self, key, data, if_absent=if_absent)

    monkeypatch.setattr(FileStore, "put_bytes", lose_answer)
    assert watched.look_and_start() == ["a"]


def test_what_deme_itself_made_is_no_checkpoint(watched: Watched) -> None:
    watched.home = watched.folder / "state"
    watched.add(f"store/merged/{'d' * 64}/upload-{'a' * 32}")
    watched.add("state/cache/merged/model")
    watched.add("statement", seed=1)
    assert list(watched.look()) == ["statement"]


def test_what_is_no_model_is_not_looked_at(watched: Watched) -> None:
    for name in ("notes/config.json", "unet/config.json.bak", "half/unet/config.json", "w/model.safetensors"):
        (watched.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (watched.folder / name).write_text("{}")
    assert watched.look() == {}


def test_files_beside_the_model_do_not_count(watched: Watched) -> None:
    watched.add("a")
    watched.look_and_start()
    (watched.folder / "a" / "samples").mkdir()
    (watched.folder / "a" / "samples" / "grid.json").write_text("{}")
    (watched.folder / "a" / "README.md").write_text("new")
    source = CountingStore(watched.folder)
    assert not watched.look(source)["a"].is_new
    assert source.calls == {"list": 1}


def test_a_malformed_ledger_entry_is_named(watched: Watched) -> None:
    watched.add("a")
    watched.look_and_start()
    [path] = watched.own.folder.rglob("last-look.json")
    path.write_text("{")
    with pytest.raises(DemeError, match=r"last-look\.json is malformed; remove it"):
        watched.look()
    path.unlink()
    assert watched.look_and_start() == []


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match=r"no folder file://.*/nowhere to watch; make it or correct"):
        open_prefix((tmp_path / "nowhere").as_uri())
    with pytest.raises(InputError, match="the prefix must be"):
        open_prefix("https://bucket/prefix")


def test_the_clock_of_the_ledger_is_the_stores(watched: Watched) -> None:
    assert abs(watched.ledger().now - datetime.now(UTC)) < timedelta(seconds=5)


def test_the_same_values_in_another_precision_are_the_same_weights(watched: Watched) -> None:
    path = watched.add("a")
    before = watched.look()["a"].look.verdict.digest
    tensors = {n: t.to(torch.float64) for n, t in open_model_folder(path).checkpoint().tensors().items()}
    save_tensors(path / "unet" / WEIGHTS_NAME, tensors)
    watched.look()
    make_older(watched)
    assert watched.look()["a"].look.verdict.digest == before
