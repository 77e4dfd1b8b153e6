"""A run of LoRA experts as a user has it, and the one LoRA that it exports."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tests.e2e.command_line import CommandLine
from tests.recipes.test_recipes_run import FEWER, settings_of


def test_a_run_of_lora_experts_exports_one_lora(stand_ins: Path, tmp_path: Path) -> None:
    deme = CommandLine(tmp_path / "home")
    lora = {"finetune.lora": "{rank: 2, alpha: 4}", "finetune.channel_projection": "false", "segments.count": 2}
    settings: dict[str, Any] = settings_of("sd14_coco30k", stand_ins) | FEWER | lora | {"merge.on_bad_expert": "keep"}
    settings |= {"finetune.learning_rate": 1e-2, "merge.search.initial_weight": 0.5}
    arguments = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    report = deme.report("run", "sd14_coco30k", *arguments)
    assert list(report["rows"]) == ["pretrained", "finetuned", "ensemble", "merged"]

    ranks = set()
    for file in (deme.home / "store" / "finetune").rglob("pytorch_lora_weights.safetensors"):
        ranks.add(file.stat().st_size)
    assert len(ranks) == 2  # The control's adapter has the rank of both copies' together.
    assert not list((deme.home / "store" / "finetune").rglob("diffusion_pytorch_model*"))

    for arguments in (["--out", "merged"], ["--lora", "--out", "lora"], ["--lora", "--rank", "1", "--out", "small"]):
        done = deme.run("export", *arguments[:-1], str(tmp_path / arguments[-1]))
        assert done.returncode == 0, done.stderr
    assert "a LoRA of rank 1 for 32 layers; relative error 0." in done.stdout
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged").unet
    one = DiffusionPipeline.from_pretrained(stand_ins / "sd")
    one.load_lora_weights(tmp_path / "lora")
    one.fuse_lora()
    given = {"timestep": torch.tensor([3, 700]), "encoder_hidden_states": torch.randn(2, 12, 16)}
    noisy = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(one.unet(noisy, **given).sample, merged(noisy, **given).sample, atol=1e-5, rtol=1e-4)
    small = json.loads((tmp_path / "small" / "lora.json").read_text())
    assert 0 < small["error"] < 1
    assert len(small["errors"]) == small["num_layers"] == 32
