"""The paper's six recipes from end to end, on tiny stand-ins for their models and CIFAR-10 (JPEG) for their images.

Some three minutes on two cores, and so no part of `make test`: `make test-recipes`.
"""

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from tests.e2e.command_line import CommandLine
from tests.tiny_clip import write_tiny_clip
from tests.tiny_models import tiny_unet, write_tiny_folder
from tests.tiny_pipelines import save_pipeline

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg" / "test.tar.xz"
PIXELS = ("ddpm_cifar10", "ddpm_lsun_church", "ddpm_lsun_bedroom")
TEXT = ("sd14_coco30k", "sd14_imagenet1k", "sd14_partiprompts")
CLASSES = ("cat", "dog", "frog", "ship")
IMAGES_PER_CLASS = 10
# Not the size of the work alone is the recipe's: precision, checkpointing, losses, search and sampler are.
FEWER = {
    "finetune.num_steps": 4,
    "finetune.batch_size": 4,
    "finetune.gradient_accumulation_steps": 2,
    "finetune.checkpoint_every": 2,
    "merge.search.max_candidates": 6,
    "merge.search.num_images": 8,
    "merge.search.num_reference_images": 12,
    "evaluate.num_images": 8,
    "evaluate.num_inference_steps": 2,
    "evaluate.batch_size": 8,
    "evaluate.kid_subset_size": 4,
    "evaluate.num_bootstrap": 5,
    "evaluate.extractor": "efficientnet_lite0",
    "evaluate.extractor_resolution": 32,
    "execution.device": "cpu",
    "execution.num_workers": 2,
}

pytestmark = pytest.mark.skipif(not CIFAR.exists(), reason="needs ../shared/data/cifar10-jpeg")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models, CIFAR-10 images with captions of their classes, and prompts."""
    folder = tmp_path_factory.mktemp("stand-ins")
    write_tiny_folder(folder / "ddpm", tiny_unet(sample_size=16, in_channels=3, out_channels=3), **THREE_CHANNELS)
    save_pipeline("StableDiffusionPipeline", folder / "sd")
    write_tiny_clip(folder / "clip")
    images, rows = folder / "images", []
    images.mkdir()
    with tarfile.open(CIFAR) as archive:
        for member in archive:
            kind = Path(member.name).parent.name
            if member.isfile() and kind in CLASSES and sum(row["kind"] == kind for row in rows) < IMAGES_PER_CLASS:
                file = archive.extractfile(member)
                assert file is not None
                name = f"{kind}-{Path(member.name).name}"
                (images / name).write_bytes(file.read())
                rows.append({"file_name": name, "text": f"a photo of a {kind}", "kind": kind})
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts.tsv").write_text("Prompt\tCategory\tChallenge\na cat\tAnimals\tBasic\na ship\tVehicles\tBasic\n")
    return folder


THREE_CHANNELS = {"sample_size": 16, "in_channels": 3, "out_channels": 3}


def settings_of(name: str, folder: Path) -> dict[str, Any]:
    images = folder / "images"
    if name in PIXELS:
        found = {"pretrained.source": folder / "ddpm", "dataset.path": images, "dataset.resolution": 16}
        images_of_its_own = {"dataset": f"{{source: imagefolder, path: {images}, resolution: 16}}"}
        return found | (images_of_its_own if name == "ddpm_cifar10" else {})
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
    assert len(pipeline(**prompt, num_inference_steps=2, output_type="np").images) == 1
