import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flows.cli import main
from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import WriteRecipe
from tests.tiny_models import one_level_unet, write_tiny_folder


def _refused(done: Any, *words: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert not done.stdout
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("deme: ")
    assert message.rstrip().endswith(".")
    for word in words:
        assert word in message, (word, message)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "digitz"], ["digitz", "digits", "ddpm_cifar10"]),
        (["run", "digits", "--set", "finetune.num_stepz=3"], ["finetune.num_stepz", "num_steps"]),
        (["run", "digits", "--set", "segments={edges: [0, 700, 600, 1000]}"], ["edges", "increase"]),
        (
            ["run", "digits", "--set", "finetune.global_sampling_probability=1.5"],
            ["global_sampling_probability", "1.5"],
        ),
        (["run", "digits", "--set", "merge={weights: [0.5, 0.5, 0.5]}"], ["2", "3"]),
        (["run", "digits", "--set", "merge.search.max_candidates=2"], ["max_candidates 2", "take 3"]),
        (
            ["run", "digits", "--set", "evaluate.metrics=[fid, clip_score]"],
            ["clip_score needs", "evaluate.prompts"],
        ),
        (["run", "digits", "--set", "evaluate.metrics=[recall, fid]"], ["fid, kid, clip_score", "recall alone"]),
        (["run", "digits", "--set", "evaluate.extractor_mode=legacy_pytorch"], ["mode of inception", "efficientnet"]),
        (["merge", "--pretrained", "nowhere", "--expert", "e", "--weights", "1", "--out", "o"], ["nowhere"]),
        (["generate", "nowhere", "--out", "o"], ["nowhere"]),
    ],
)
def test_what_the_arguments_get_wrong(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, for time's sake: nothing starts before the arguments are read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEME_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["deme", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    _refused(subprocess.CompletedProcess(arguments, left.value.code, said.out, said.err), *words)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", ["follow", "deploy"])
@pytest.mark.parametrize(
    ("address", "words"),
    [
        (None, ["no PREFECT_API_URL", "deme up"]),
        ("http://127.0.0.1:9/api", ["PREFECT_API_URL", "does not answer"]),
        ("http://user:marked-hush@127.0.0.1:9/api", ["PREFECT_API_AUTH_STRING"]),
    ],
)
def test_a_prefect_server_that_is_none(command: str, address: str | None, words: list[str], tmp_path: Path) -> None:
    server = {"PREFECT_API_URL": address} if address else {}
    done = CommandLine(tmp_path / "home", server).run(command)
    _refused(done, *words)
    assert "hush" not in done.stderr


def test_prompts_that_are_missing_are_said(fresh_deme: CommandLine) -> None:
    done = fresh_deme.run("run", "digits", "--set", "evaluate.prompts=absent.txt")
    _refused(done, "absent.txt cannot be read", "evaluate.prompts")


@pytest.fixture
def broken_images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(np.full((9, 9, 3), 40 * index, np.uint8)).save(folder / f"{index}.png")
    (folder / "torn.png").write_bytes((folder / "3.png").read_bytes()[:40])
    return folder


def test_what_a_worker_finds_reaches_the_user(
    fresh_deme: CommandLine, write_recipe: WriteRecipe, broken_images: Path
) -> None:
    dataset: Mapping[str, Any] = {"source": "imagefolder", "path": str(broken_images), "resolution": 8}
    _refused(fresh_deme.run("run", write_recipe(dataset=dataset)), "torn.png", "skip_broken")
    assert not list(fresh_deme.home.glob("store/*/*/manifest.json"))


def _write_model(folder: Path, model: torch.nn.Module) -> str:
    blocks = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    return str(write_tiny_folder(folder, model, **blocks))


@pytest.mark.long
def test_too_few_candidates_for_all_blocks_are_told_before_anything_is_trained(
    fresh_deme: CommandLine, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    def merge(candidates: int) -> dict[str, Any]:
        return {"method": "block_weights", "search": {"max_candidates": candidates, "num_images": 8}}

    _refused(fresh_deme.run("run", write_recipe(merge=merge(8))), "max_candidates 8 is too small for 8 weights")
    assert not fresh_deme.home.joinpath("store").exists()
    elsewhere = {"source": _write_model(tmp_path / "model", one_level_unet())}
    done = fresh_deme.run("run", write_recipe(merge=merge(6), pretrained=elsewhere))
    _refused(done, "max_candidates 6 is too small for 6 weights")
    made = {folder.parent.name for folder in fresh_deme.home.glob("store/*/*")}
    assert "pretrained" in made and "finetune" not in made


def test_a_model_that_diverged_is_named_and_so_is_a_reference_too_small(
    fresh_deme: CommandLine, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    model = one_level_unet()
    torch.nn.init.constant_(model.conv_out.bias, float("nan"))
    done = fresh_deme.run("evaluate", _write_model(tmp_path / "model", model), "--recipe", write_recipe())
    _refused(done, "Row model: 4 of 4 images generated under seed", "NaN or infinite", "lower learning rate")
    warning = " ".join(done.stderr.split())
    assert "32 real and 8 generated images are fewer than the 1,280 features of efficientnet_lite0" in warning
    assert "kid has no such bias" in warning


def test_an_unreachable_store_is_said_at_once(fresh_deme: CommandLine, write_recipe: WriteRecipe) -> None:
    done = fresh_deme.run(
        "run",
        write_recipe(),
        extra={
            "DEME_STORE_URI": "s3://bucket/prefix",
            "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "not-to-be-printed",
        },
    )
    _refused(done, "127.0.0.1:9", "AWS_ENDPOINT_URL")
    assert "not-to-be-printed" not in done.stderr
