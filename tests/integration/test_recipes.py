"""The paper's six benchmarks, with something tiny in the place of all that they take from elsewhere."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from deme_core.recipe_file import load_recipe
from deme_core.settings import Settings
from flows import evaluation
from flows.doctor import run_checks
from flows.recipe_checks import RecipeChecks
from tests.tiny_clip import write_tiny_clip
from tests.tiny_models import one_level_unet, write_tiny_folder
from tests.tiny_pipelines import save_pipeline

PIXELS = ("ddpm_cifar10", "ddpm_lsun_church", "ddpm_lsun_bedroom")
TEXT = ("sd14_coco30k", "sd14_imagenet1k", "sd14_partiprompts")
DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models, images with captions, and prompts."""
    folder = tmp_path_factory.mktemp("stand-ins")
    blocks = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    write_tiny_folder(folder / "ddpm", one_level_unet(), **blocks)
    save_pipeline("StableDiffusionPipeline", folder / "sd")
    write_tiny_clip(folder / "clip")
    (folder / "images").mkdir()
    rng, rows = torch.Generator().manual_seed(0), []
    for index in range(24):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": f"a photo {index}"}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(rows))
    (folder / "prompts.tsv").write_text("Prompt\tCategory\tChallenge\na cat\tAnimals\tBasic\na ship\tVehicles\tBasic\n")
    return folder


def overrides(name: str, folder: Path) -> list[str]:
    """Returns the settings that put the stand-ins in place, and nothing else of the recipe's."""
    images = folder / "images"
    found = ["execution.device=cpu", "evaluate.extractor=efficientnet_lite0"]
    if name in PIXELS:
        dataset = f"{{source: imagefolder, path: {images}, resolution: 8, channels: 1}}"
        return [*found, f"pretrained.source={folder / 'ddpm'}", f"dataset={dataset}"]
    found += [f"pretrained.source={folder / 'sd'}", f"dataset.path={images}", "dataset.resolution=16"]
    found += [f"evaluate.clip_weights={folder / 'clip'}"]
    if name != "sd14_imagenet1k":
        found.append(f"evaluate.prompts={folder / 'prompts.tsv'}")
    if name != "sd14_partiprompts":
        found.append(f"evaluate.reference_dataset={{source: imagefolder, path: {images}, resolution: 16}}")
    return found


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_HOME", str(tmp_path / "home"))


def doctor(name: str, *settings: str) -> tuple[int, str]:
    console = Console(record=True, width=400, quiet=False, force_terminal=False)
    code = run_checks(console, RecipeChecks(load_recipe(name, settings), Settings()))
    return code, console.export_text()


@pytest.mark.parametrize("name", [*PIXELS, *TEXT])
def test_the_doctor_finds_all_that_a_recipe_needs(name: str, stand_ins: Path) -> None:
    code, said = doctor(name, *overrides(name, stand_ins))
    assert code == 0, said
    assert "FAIL" not in said
    assert "24 images" in said
    found = [line.split(maxsplit=1)[1] for line in said.splitlines()]
    assert [line for line in found if line.startswith("time") and "GPU-hours at 40% of an H100" in line]
    assert [line for line in found if line.startswith("storage") and " of models" in line]
    if name in TEXT:
        assert "a photo of a tench" in said or "2 for" in said


def test_jobs_of_real_images_take_those_that_the_recipe_names_for_them() -> None:
    recipe = load_recipe("sd14_coco30k")
    for part in ("search", "report"):
        assert evaluation._real_slice(recipe, part, 0).dataset.path == "coco/val2014"
    assert evaluation._real_slice(load_recipe("sd14_partiprompts"), "report", 0).dataset.path == "coco/train2014"


def test_the_doctor_says_in_one_line_each_what_is_missing(stand_ins: Path) -> None:
    settings = overrides("sd14_coco30k", stand_ins)
    code, said = doctor("sd14_coco30k", *settings, "evaluate.prompts=absent.txt", "dataset.path=nowhere")
    failed = [line for line in said.splitlines() if line.startswith("FAIL")]
    assert code == 2
    assert [line.split()[1] for line in failed] == ["data", "prompts"]
    assert "GPU-hours" not in said


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dataset.resolution=32", "makes images of 16 pixels and 3 channels, not of 32 and 3"),
        ("segments={edges: [0, 10, 20, 30, 40]}", "must start at 0 and end at 1000"),
        ("evaluate.sampler=flow_match_euler", "does not fit a StableDiffusionPipeline"),
        ("dataset={source: imagefolder, path: x, resolution: 16}", "images with captions"),
        ("merge={method: block_weights, search: {max_candidates: 9}}", "max_candidates 9 is too small for"),
        ("execution.device=cuda", "this machine shows no GPU"),
    ],
)
def test_the_doctor_finds_what_does_not_fit(
    setting: str, message: str, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, said = doctor("sd14_coco30k", *overrides("sd14_coco30k", stand_ins), setting)
    assert code == 2
    assert message in said


def test_the_commands_of_the_docs_write_captions_and_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("annotations", "train2014"):
        (tmp_path / "coco" / folder).mkdir(parents=True)
    content = {
        "images": [{"id": 5, "file_name": "5.jpg"}, {"id": 3, "file_name": "3.jpg"}],
        "annotations": [
            {"id": 9, "image_id": 3, "caption": "later"},
            {"id": 2, "image_id": 3, "caption": "A dog\n runs. "},
            {"id": 4, "image_id": 5, "caption": "A cat."},
        ],
    }
    for part in ("train", "val"):
        (tmp_path / "coco" / "annotations" / f"captions_{part}2014.json").write_text(json.dumps(content))
    for script in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(script, {})
    rows = [json.loads(line) for line in (tmp_path / "coco/train2014/metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": "3.jpg", "text": "A dog runs."}, {"file_name": "5.jpg", "text": "A cat."}]
    assert sorted((tmp_path / "coco/prompts_30k.txt").read_text().splitlines()) == ["A cat.", "A dog runs."]
