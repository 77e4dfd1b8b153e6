"""A text-conditional model trained from nothing, through the jobs of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, IFPipeline
from rich.console import Console

from deme_core.errors import InputError
from deme_core.model_folder import open_model_folder
from deme_core.recipe import DatasetSpec, EvaluateSpec, FinetuneSpec, TrainingSpec
from deme_core.recipe_file import load_recipe
from deme_core.settings import Settings
from deme_core.untrained_text_model import write_untrained_text_model
from flows.doctor import run_checks
from flows.recipe_checks import RecipeChecks
from tasks.jobs import Demands, FinetuneJob, GeneratedFeaturesJob, GeneratedImages, JobResult, MergeJob, PretrainJob
from tasks.work.base import JobContext, execute
from tests.family_method import two_classes
from tests.tiny_models import same_bits

TEXT_ENCODER = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}


@pytest.fixture
def dataset(tmp_path: Path) -> DatasetSpec:
    (tmp_path / "images").mkdir()
    return two_classes(tmp_path / "images").model_copy(update={"label_column": None})


@pytest.fixture
def context(tmp_path: Path) -> JobContext:
    return JobContext(Settings.model_validate({"DEME_HOME": tmp_path / "home", "DEME_STORE_URI": None}), "cpu")


def pretrain(context: JobContext, dataset: DatasetSpec, *, num_steps: int = 3, **changed: Any) -> JobResult:
    job = PretrainJob(
        dataset=dataset,
        unet=UNET,
        noise_scheduler={},
        training=TrainingSpec(num_steps=num_steps, batch_size=8, learning_rate=1e-3, ema_decay=0.5),
        text_encoder=TEXT_ENCODER,
    )
    return execute(job.model_copy(update=changed), context, lambda _: None)


def test_steps_that_do_not_fit_are_told_before_anything_is_trained(context: JobContext, dataset: DatasetSpec) -> None:
    with pytest.raises(InputError, match="600 leading steps"):
        evaluate = EvaluateSpec(num_images=2, num_inference_steps=600)
        demands = Demands(samplings=(evaluate,), min_snr_gammas=())
        pretrain(context, dataset, num_steps=10**9, demands=demands)


def test_what_was_learned_from_captions_is_a_stock_pipeline_that_takes_text(
    context: JobContext, dataset: DatasetSpec
) -> None:
    pretrained = pretrain(context, dataset)
    folder = context.fetch(pretrained.ref)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline, IFPipeline)
    assert pipeline.tokenizer.tokenize("a photo of a truck") == [
        f"\u2581{word}" for word in ["a", "photo", "of", "a", "truck"]
    ]
    settings: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 2.0}
    cat, truck = (
        pipeline(f"a photo of a {kind}", generator=torch.Generator().manual_seed(0), **settings).images
        for kind in ("cat", "truck")
    )
    assert cat.shape == (1, 16, 16, 3)
    assert abs(cat - truck).max() > 1e-5
    assert pretrained.metrics["caches"] == []

    finetune = FinetuneSpec(num_steps=2, batch_size=4)
    job = FinetuneJob(
        label="all", pretrained=pretrained.ref, dataset=dataset, finetune=finetune, low=0, high=1000, num_steps=2
    )
    expert = execute(job, context, lambda _: None)
    merge = MergeJob(
        pretrained=pretrained.ref, experts=(expert.ref,), method=load_recipe("digits").merge, weights=(0.5,)
    )
    merged = execute(merge, context, lambda _: None)
    assert isinstance(DiffusionPipeline.from_pretrained(context.fetch(merged.ref)), IFPipeline)
    features = GeneratedFeaturesJob(
        label="row",
        images=GeneratedImages(models=(merged.ref,), edges=None, seed=1),
        evaluate=EvaluateSpec(
            num_images=4,
            num_inference_steps=4,
            prompts="cifar10",
            extractor="efficientnet_lite0",
            extractor_resolution=32,
        ),
        low=0,
        high=4,
    )
    assert execute(features, context, lambda _: None).metrics["num_images"] == 4


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = write_untrained_text_model(
            tmp_path / name,
            unet=UNET,
            noise_scheduler={},
            text_encoder=TEXT_ENCODER,
            captions=["a cat", "A Truck"],
            image_shape=(3, 16, 16),
            seed=seed,
        )
        pipeline = DiffusionPipeline.from_pretrained(folder.path)
        states.append(pipeline.unet.state_dict() | pipeline.text_encoder.state_dict())
    first, second, other = states
    assert all(same_bits(tensor, second[name]) for name, tensor in first.items())
    assert not all(same_bits(tensor, other[name]) for name, tensor in first.items())


def test_the_text_encoder_is_part_of_what_the_model_is(context: JobContext, dataset: DatasetSpec) -> None:
    first = pretrain(context, dataset, num_steps=1)
    wider = pretrain(context, dataset, num_steps=1, text_encoder=TEXT_ENCODER | {"d_ff": 32})
    again = pretrain(context, dataset, num_steps=1)
    assert first.ref.digest == again.ref.digest != wider.ref.digest
    assert open_model_folder(context.fetch(first.ref)).index.frozen_parts == ("text_encoder", "tokenizer")


def test_text_without_captions_and_parts_that_cannot_be_built_are_refused(
    context: JobContext, dataset: DatasetSpec
) -> None:
    without = dataset.model_copy(update={"caption_template": None, "caption_dropout": 0.0})
    with pytest.raises(InputError, match=r"the images have none; set dataset\.caption_column or"):
        pretrain(context, without)
    with pytest.raises(InputError, match=r"pretrained\.unet or text_encoder cannot be built"):
        pretrain(context, dataset, unet=UNET | {"block_out_channels": [8]})


def test_the_doctor_knows_the_recipe(dataset: DatasetSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_HOME", str(tmp_path / "home"))
    console = Console(record=True, width=400, force_terminal=False)
    recipe = load_recipe("cifar10_text_tiny", [f"dataset.path={dataset.path}", "evaluate.num_reference_images=null"])
    code = run_checks(console, RecipeChecks(recipe, Settings()))
    said = console.export_text()
    assert code == 0, said
    assert "'a photo of a airplane' and so on, 10 prompts; the report's 100 images are 10 of each" in said
    code = run_checks(
        console,
        RecipeChecks(
            recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"prompts": None})}), Settings()
        ),
    )
    assert code == 2
    assert "A IFPipeline makes images from text; set evaluate.prompts" in console.export_text()
