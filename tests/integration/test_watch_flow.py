"""The flow `deme-watch` on a real Prefect server, with the real `deme/full` as what it starts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client

from deme_core.errors import InputError, StoreUnavailableError
from deme_core.recipe_file import load_recipe
from flows.decouple_then_merge import deme
from flows.watch_checkpoints import watch
from tests.tiny_models import one_level_unet, randomize, write_tiny_folder

CONFIG = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}


@pytest.fixture(scope="module")
def deployment(prefect_server: None) -> None:
    deme.to_deployment(name="full").apply()


@pytest.fixture
def inbox(deployment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEME_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DEME_STORE_URI", raising=False)
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


def add(path: Path, seed: int) -> Path:
    return write_tiny_folder(path, randomize(one_level_unet(), seed=seed), **CONFIG)


def runs_of(uri: str) -> list[Any]:
    with get_client(sync_client=True) as client:
        return [run for run in client.read_flow_runs() if any(uri in o for o in run.parameters.get("overrides", ()))]


def test_each_checkpoint_starts_one_run_that_can_be_read(inbox: Path) -> None:
    add(inbox / "a: {b}, ü", seed=1)
    weights = next(add(inbox / "broken", seed=2).rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    parameters: dict[str, Any] = {
        "prefix": inbox.as_uri(),
        "overrides": ["finetune.num_steps=3"],
        "settle_seconds": 0,
    }
    first, second = watch(**parameters), watch(**parameters)
    [(uri, flow_run_id)] = first["started"].items()
    assert list(first["broken"]) == [(inbox / "broken").as_uri()]
    assert (second["started"], second["broken"], second["num_folders"]) == ({}, {}, 2)
    [run] = runs_of(uri)
    assert str(run.id) == flow_run_id
    assert run.idempotency_key.startswith("deme-watch-digits-") and run.parent_task_run_id is None
    recipe = load_recipe(run.parameters["recipe"], run.parameters["overrides"])
    assert (recipe.pretrained.source, recipe.pretrained.training) == (uri, None)
    assert recipe.finetune.num_steps == 3
    told = Artifact.get("new-checkpoints")
    assert told is not None and uri in str(told.data) and "broken" in str(told.data)
    forget_start(inbox)
    assert watch(**parameters)["started"] == {uri: flow_run_id}, "Prefect still knows the run"
    with get_client(sync_client=True) as client:
        client.delete_flow_run(run.id)
    forget_start(inbox)
    again = watch(**parameters)["started"]
    assert list(again) == [uri] and again[uri] != flow_run_id


def test_watches_of_two_prefixes_start_runs_of_their_own_for_the_same_weights(inbox: Path) -> None:
    """Else the second would name the first's run as its own, and its overrides would never be tried."""
    uris = []
    for number in (1, 2):
        prefix = inbox / str(number)
        uris.append(add(prefix / "a", seed=5).as_uri())
        overrides = [f"finetune.num_steps={number}"]
        watch(prefix=prefix.as_uri(), overrides=overrides, settle_seconds=0)
    [[first], [second]] = [runs_of(uri) for uri in uris]
    assert first.id != second.id
    assert [run.parameters["overrides"][0] for run in (first, second)] == [
        "finetune.num_steps=1",
        "finetune.num_steps=2",
    ]


def forget_start(inbox: Path) -> None:
    [start] = (inbox.parent / "home").rglob("watch/*/starts/*.json")
    assert json.loads(start.read_text())["flow_run_id"]
    start.unlink()


def test_without_a_prefix_it_looks_into_the_store(inbox: Path) -> None:
    assert watch(settle_seconds=0)["num_folders"] == 0
    add(inbox.parent / "home" / "store" / "incoming" / "a", seed=3)
    assert len(watch(settle_seconds=0)["started"]) == 1


def test_a_missing_deployment_is_said_and_mended_later(inbox: Path) -> None:
    add(inbox / "a", seed=4)
    with pytest.raises(InputError, match="no deployment deme/none; register it with deme deploy"):
        watch(prefix=inbox.as_uri(), settle_seconds=0, deployment="deme/none")
    assert watch(prefix=inbox.as_uri(), settle_seconds=0)["started"] == {}, "the claim is fresh"
    assert runs_of((inbox / "a").as_uri()) == []


def test_bad_parameters_are_said(inbox: Path) -> None:
    with pytest.raises(InputError, match="no recipe 'nothing'"):
        watch(prefix=inbox.as_uri(), recipe="nothing")
    with pytest.raises(StoreUnavailableError, match="to watch; make it or correct the prefix"):
        watch(prefix=(inbox / "nowhere").as_uri())
    with pytest.raises(Exception, match="prefix"):
        watch(prefix="incoming")


def test_the_flow_process_imports_no_torch() -> None:
    code = "import sys, flows.watch_checkpoints; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
