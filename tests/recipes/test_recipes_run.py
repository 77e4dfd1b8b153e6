"""The paper's six recipes from end to end, on tiny stand-ins for their models and CIFAR-10 (JPEG) for their images.

Some three minutes on two cores, and so no part of `make test`: `make test-recipes`.
"""

import math
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from tests.e2e.command_line import CommandLine

PIXELS = ("ddpm_cifar10", "ddpm_lsun_church", "ddpm_lsun_bedroom")
TEXT = ("sd14_coco30k", "sd14_imagenet1k", "sd14_partiprompts")
# Not the size of the work alone is the recipe's: precision, checkpointing, losses, search and sampler are.
FEWER = {
    "finetune.num_steps": 4,
    "finetune.batch_size": 4,
    "finetune.gradient_accumulation_steps": 2,
    "finetune.checkpoint_every": 2,
    "merge.search.max_candidates": 10,
    "merge.search.num_images": 8,
    "merge.search.num_reference_images": 12,
    "evaluate.num_images": 8,
    "evaluate.num_inference_steps": 4,
    "evaluate.batch_size": 8,
    "evaluate.kid_subset_size": 4,
    "evaluate.num_bootstrap": 5,
    "evaluate.extractor": "efficientnet_lite0",
    "evaluate.extractor_resolution": 32,
    "execution.device": "cpu",
    "execution.num_workers": 2,
}


def settings_of(name: str, folder: Path) -> dict[str, Any]:
    images = folder / "images"
    if name in PIXELS:
        found = {"pretrained.source": folder / "ddpm", "dataset.path": images, "dataset.resolution": 16}
        its_own: dict[str, dict[str, Any]] = {
            "ddpm_cifar10": {"dataset": f"{{source: imagefolder, path: {images}, resolution: 16}}"},
            "ddpm_lsun_bedroom": {"dataset.num_images": 36},
        }
        return found | its_own.get(name, {})
    found = {"pretrained.source": folder / "sd", "dataset.path": images, "dataset.resolution": 16}
    found["evaluate.clip_weights"] = folder / "clip"
    if name != "sd14_imagenet1k":
        found["evaluate.prompts"] = folder / "prompts.tsv"
    if name != "sd14_partiprompts":
        found["evaluate.reference_dataset"] = f"{{source: imagefolder, path: {images}, resolution: 16}}"
    return found


@pytest.mark.parametrize("name", [*PIXELS, *TEXT])
def test_a_recipe_runs_from_end_to_end(name: str, stand_ins: Path, tmp_path: Path) -> None:
    deme = CommandLine(tmp_path / "home")
    settings = settings_of(name, stand_ins) | FEWER
    if name == "sd14_partiprompts":
        settings |= {"evaluate.num_reference_images": 12}
    arguments = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    report = deme.report("run", name, *arguments)
    assert list(report["rows"]) == ["pretrained", "finetuned", "ensemble", "merged"]
    for scores in report["rows"].values():
        assert all(math.isfinite(score["mean"]) for score in scores.values())
    assert report["metric"] == ("clip_score" if name == "sd14_partiprompts" else "fd_efficientnet_lite0")

    done = deme.run("export", "--out", str(tmp_path / "merged"))
    assert done.returncode == 0, done.stderr
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    prompt = {"prompt": "a photo of a cat"} if name in TEXT else {}
    assert len(pipeline(**prompt, num_inference_steps=4, output_type="np").images) == 1


def test_the_model_that_learns_captions_from_nothing(stand_ins: Path, tmp_path: Path) -> None:
    deme = CommandLine(tmp_path / "home")
    fewer = {key: value for key, value in FEWER.items() if not key.startswith("merge.search")}
    settings = fewer | {
        "pretrained.training.num_steps": 4,
        "pretrained.training.lr_warmup_steps": 1,
        "dataset.path": stand_ins / "images",
        "dataset.caption_template": "a photo of a {kind}",
        "evaluate.num_images": 20,
        "evaluate.batch_size": 20,
        "evaluate.num_reference_images": 20,
    }
    arguments = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    report = deme.report("run", "cifar10_text_tiny", *arguments)
    assert list(report["rows"]) == ["pretrained", "finetuned", "ensemble", "merged"]
    page = Path(deme.run("report").stdout.strip()).read_text()
    assert all(f"a photo of a {kind}" in page for kind in ("airplane", "truck"))
    done = deme.run("export", "--out", str(tmp_path / "merged"))
    assert done.returncode == 0, done.stderr
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    made = pipeline("a photo of a frog", num_inference_steps=4, output_type="np").images
    assert made.shape == (1, 16, 16, 3)
