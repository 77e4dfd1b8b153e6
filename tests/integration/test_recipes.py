"""The paper's six benchmarks, with something tiny in the place of all that they take from elsewhere."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from deme_core.cost_estimate import H100_PEAK, UTILIZATION, estimate_cost
from deme_core.denoiser_size import measure_denoiser
from deme_core.errors import InputError
from deme_core.families import Unconditional
from deme_core.families.dit import DiT
from deme_core.families.stable_diffusion import StableDiffusion
from deme_core.images.preview import Preview
from deme_core.recipe_file import load_recipe
from deme_core.settings import Settings
from flows import evaluation
from flows.doctor import run_checks
from flows.recipe_checks import RecipeChecks, _described
from flows.recipe_estimate import RecipeEstimate
from tests.tiny_clip import write_tiny_clip
from tests.tiny_models import one_level_unet, write_tiny_folder
from tests.tiny_pipelines import save_pipeline

PIXELS = ("ddpm_cifar10", "ddpm_lsun_church", "ddpm_lsun_bedroom")
TEXT = ("sd14_coco30k", "sd14_imagenet1k", "sd14_partiprompts")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "recipes.md"
# Of the recipes' own models what their configs say beside diffusers' defaults, as far as it is counted.
DDPM = {
    "_class_name": "UNet2DModel",
    "in_channels": 3,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * 2],
    "up_block_types": [*["UpBlock2D"] * 2, "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
}
LARGE_DDPM = {
    **DDPM,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
SD14 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD14_FROZEN_BYTES = 4 * (83_653_863 + 123_060_480)  # Autoencoder and text encoder.
NUM_COCO_IMAGES = 82_783


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
    """Returns the settings that put the stand-ins in place, which are few images, and nothing else of the recipe's."""
    images = folder / "images"
    found = ["execution.device=cpu", "evaluate.extractor=efficientnet_lite0"]
    found += ["merge.search.num_reference_images=10", "evaluate.num_reference_images=null"]
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
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEME_HOME", str(tmp_path / "home"))
    leave_free(10**12, monkeypatch)
    return tmp_path / "home"


def leave_free(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=num_bytes))


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
    assert [line for line in found if line.startswith("storage") and " of models" in line and ", 1 at once)" in line]
    assert [line for line in found if line.startswith("disk") and "cache, scratch and object store" in line]
    if name in TEXT:
        assert "1,000 prompts; " in said or "2 prompts; " in said
        assert " of each and the search's " in said


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
        ("merge.search.num_reference_images=23", "23 leaves none of the 24 images of the data set for the report"),
        ("evaluate.num_reference_images=15", "asks for 15 images, but only 14 are there"),
        ("dataset.num_heldout_images=24", "leaves none of the 24 images for training"),
        ("evaluate.num_inference_steps=1001", "are more than the model's 1000 timesteps"),
        ("finetune.optimizer=adamw_8bit", "needs the package bitsandbytes"),
    ],
)
def test_the_doctor_finds_what_does_not_fit(
    setting: str, message: str, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, said = doctor("sd14_coco30k", *overrides("sd14_coco30k", stand_ins), setting)
    assert code == 2
    assert message in said


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pretrained.unet.dropuot=0.1", "pretrained.unet: a UNet2DModel has no dropuot (did you mean dropout?)."),
        ("pretrained.noise_scheduler.beta_strat=1", "pretrained.noise_scheduler cannot be built"),
        ("dataset.cache_latents=true", "this one is on pixels"),
        ("evaluate.guidance_scale=3", "Nothing can guide a DDPMPipeline"),
        ("dataset.num_images=500", "600 leaves none of the 500 images"),
    ],
)
def test_the_doctor_finds_what_does_not_fit_a_model_that_is_trained_here(setting: str, message: str) -> None:
    code, said = doctor("digits", setting)
    assert code == 2
    assert message in said


def _disk_line(said: str) -> tuple[str, ...]:
    return next((tuple(line.split(maxsplit=2)[::2]) for line in said.splitlines() if line.split()[1] == "disk"), ())


def test_the_doctor_says_how_many_images_each_class_has() -> None:
    recipe = load_recipe("digits", ["evaluate.num_images=600", "merge.search.num_images=25"])
    told = RecipeChecks(recipe, Settings())._shares(10, "classes")
    assert told == ("10 classes; the report's 600 images are 60 of each and the search's 25 images are 2 or 3 of each")


def test_the_doctor_shows_the_beginning_of_texts_and_how_classes_are_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a photo of " + "a cat and " * 10
    (tmp_path / "prompts.txt").write_text(text)
    recipe = load_recipe("digits", [f"evaluate.prompts={tmp_path / 'prompts.txt'}"])
    checks = RecipeChecks(recipe, Settings())
    assert checks._prompts().startswith(f"'{text[:59]}…' and so on, 1 prompts")
    checks._adapter = DiT(denoiser_config={"num_embeds_ada_norm": 1000}, scheduler_config={})
    found = Preview(3, text, [0, 1], ["goldfish", "tench"])
    checks._images = found
    assert checks._classes().endswith(
        "the data set has 2 of them, numbered in the order of their names (goldfish 0, tench 1): see that the model "
        "numbers them so"
    )
    checks._images = replace(found, class_names=None, labels=[0, 1000])
    with pytest.raises(InputError, match=r"classes 0 to 999, but there are images of class 1000; .* of ImageNet-1k"):
        checks._classes()
    assert _described(recipe.dataset, found) == f"digits, 3 images, the first '{text[:59]}…'"
    unknown = _described(recipe.dataset, Preview(None, is_looked_at=False))
    assert unknown == "digits, unknown number of images, none of which was looked at before the run fetches them"
    monkeypatch.setattr("flows.recipe_checks.preview_images", lambda *_: Preview(None))
    assert checks._dataset() == "digits, unknown number of images; without their number there is no estimate"


def test_the_doctor_counts_training_and_images_each_in_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: dict[str, float] = {}
    cost = SimpleNamespace(training_flops=1.0, search_flops=1.0, evaluation_flops=1.0)
    cost.seconds = lambda **given: rates.update(given) or 3600.0
    settings = ["finetune.mixed_precision=bf16", "evaluate.mixed_precision=fp32", "execution.runner=prefect"]
    adapter: Any = None
    estimate = RecipeEstimate(
        load_recipe("digits", settings), Settings(), adapter, num_images=1, num_features=1, frozen_bytes=0
    )
    monkeypatch.setattr(RecipeEstimate, "_cost", cost)
    estimate._time()
    assert rates["training_rate"] / rates["image_rate"] == H100_PEAK["bf16"] / H100_PEAK["fp32"]


def test_the_doctor_compares_the_disk_with_what_a_run_needs(
    stand_ins: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Features of 4 rows, 3 seeds and 50,000 images, 1,280 numbers each: 3.07 GB in the cache, and in the store.
    settings = overrides("ddpm_cifar10", stand_ins)
    leave_free(10**9, monkeypatch)
    code, said = doctor("ddpm_cifar10", *settings)
    assert code == 2
    needs = "A run from nothing needs up to {} for {}, and the disk of {} has 1 GB free; free space or point DEME_HOME"
    failed = ("FAIL", needs.format("6.15 GB", "cache, scratch and object store", home) + " elsewhere.")
    assert _disk_line(said) == failed

    monkeypatch.setenv("DEME_STORE_URI", "s3://deme/store")
    assert _disk_line(doctor("ddpm_cifar10", *settings)[1])[1].startswith(
        needs.format("3.07 GB", "cache and scratch", home)
    )
    # The store of `deme up` is a folder there, too.
    (home / "stack").mkdir(parents=True)
    (home / "stack" / "state.json").write_text('{"ports": {"s3": 8333}}')
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8333")
    assert _disk_line(doctor("ddpm_cifar10", *settings)[1]) == failed


def test_data_of_remote_runners_are_on_other_disks(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_free(0, monkeypatch)
    settings = overrides("ddpm_cifar10", stand_ins)
    for runner, num_trainings in (("prefect", 9), ("prefect, num_workers: 2", 2), ("ray", 9)):
        execution = f"execution={{runner: {runner}}}"
        code, said = doctor("ddpm_cifar10", *settings, execution)
        assert (code, _disk_line(said)) == (0, ())
        assert f", {num_trainings} at once)" in said


def test_the_doctor_counts_the_trainings_that_gpus_have_room_for(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    settings = overrides("ddpm_cifar10", stand_ins)
    for more, num_trainings in (([], 5), (["execution.num_workers=3"], 3), (["finetune.num_processes=2"], 2)):
        code, said = doctor("ddpm_cifar10", *settings, "execution.device=cuda", *more)
        assert code == 0, said
        assert f", {num_trainings} at once)" in said
    assert "or 2 trainings of 2 GPUs" in said


@pytest.mark.parametrize("name", [*PIXELS, *TEXT])
def test_docs_and_headers_quote_the_estimate(name: str) -> None:
    recipe, is_text = load_recipe(name), name in TEXT
    if is_text:
        adapter = StableDiffusion(denoiser_config=SD14, scheduler_config={})
    else:
        config = DDPM if name == "ddpm_cifar10" else LARGE_DDPM
        sample_size = {"sample_size": recipe.dataset.resolution}
        adapter = Unconditional(denoiser_config=config | sample_size, scheduler_config={})
    size = measure_denoiser(adapter, channel_projection=True)
    one, many = (
        estimate_cost(
            recipe,
            size,
            num_images=NUM_COCO_IMAGES if is_text else 0,
            num_features=512 if name == "sd14_partiprompts" else 2048,
            frozen_bytes=SD14_FROZEN_BYTES if is_text else 0,
            num_workers=num_workers,
        )
        for num_workers in (1, None)
    )
    hour = {precision: UTILIZATION * peak * 3600 for precision, peak in H100_PEAK.items()}
    estimated = [one.training_flops / hour["bf16"], one.search_flops / hour["fp32"]]
    estimated.append(one.evaluation_flops / hour["fp32"])
    sizes = [
        one.memory_bytes,
        one.sampling_bytes,
        one.storage_bytes,
        many.storage_bytes,
        one.local_bytes,
        many.local_bytes,
    ]
    estimated += [num_bytes / 1e9 for num_bytes in sizes]

    rows = [line.strip("| ").split(" | ") for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}`")]
    quoted = [cell.removesuffix(" GB") for cell in rows[-1][1:]]
    for number, text in zip(estimated, quoted, strict=True):
        assert abs(float(text) - number) <= 0.06 * 10 ** (1 - len(text.partition(".")[2])), (text, number)

    header = " ".join(re.findall(r"^# (.*)", (ROOT / "recipes" / f"{name}.yaml").read_text(), re.MULTILINE))
    training, searches, images, of_training, of_candidate, store, store_of_many, cache, cache_of_many = quoted
    assert f" {training} of them for training, {searches} for searches and {images} for the report's images" in header
    assert f"; {max(of_training, of_candidate, key=float)} GB of GPU memory" in header
    assert f"the peak {store} GB in the object store and {cache} GB of cache and scratch with one GPU, " in header
    assert f", {store_of_many} GB and {cache_of_many} GB with " in header


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
