"""Copies that were finetuned elsewhere: brought into the store, and merged by a recipe."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deme_core.errors import ModelFolderError
from deme_core.manifest import ArtifactRef
from deme_core.model_folder import load_denoiser
from deme_core.recipe import MethodSpec
from deme_core.recipe_file import load_recipe
from flows.recipe_checks import RecipeChecks
from tasks.jobs import ImportCopyJob, ImportJob, JobResult, MergeJob
from tasks.work.base import JobContext, execute
from tests.small_run import make_context
from tests.tiny_models import one_level_unet, randomize, write_tiny_folder
from tests.tiny_pipelines import save_pipeline

CONFIG = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}


def model(home: Path, seed: int) -> Path:
    return write_tiny_folder(home / f"model {seed}", randomize(one_level_unet(), seed=seed), **CONFIG)


def imported(source: Path, context: JobContext) -> ArtifactRef:
    return execute(ImportJob(source=str(source)), context, lambda _: None).ref


def copied(pretrained: ArtifactRef, source: Path, context: JobContext) -> JobResult:
    job = ImportCopyJob(label="segment 0", pretrained=pretrained, source=str(source))
    return execute(job, context, lambda _: None)


def test_copies_from_elsewhere_are_merged_like_those_that_were_trained_here(tmp_path: Path) -> None:
    context, sources = make_context(tmp_path), [model(tmp_path, seed) for seed in range(3)]
    pretrained = imported(sources[0], context)
    copies = [copied(pretrained, source, context) for source in sources[1:]]
    assert [copy.metrics for copy in copies] == [{"history": []}] * 2
    assert copied(pretrained, sources[1], context).cached
    assert copies[0].ref.digest != copied(imported(sources[2], context), sources[1], context).ref.digest

    job = MergeJob(
        pretrained=pretrained, experts=tuple(copy.ref for copy in copies), method=MethodSpec(), weights=(0.25, 0.5)
    )
    merged = load_denoiser(context.open_model(execute(job, context, lambda _: None).ref)).state_dict()
    start, *ends = (randomize(one_level_unet(), seed=seed).state_dict() for seed in range(3))
    for name, tensor in start.items():
        expected = tensor + 0.25 * (ends[0][name] - tensor) + 0.5 * (ends[1][name] - tensor)
        torch.testing.assert_close(merged[name], expected)


def test_of_a_copy_the_denoiser_alone_is_kept(tmp_path: Path) -> None:
    context, source = make_context(tmp_path), save_pipeline("StableDiffusionPipeline", tmp_path / "stock")
    pretrained = imported(source, context)
    folder = context.open_model(copied(pretrained, source, context).ref)
    assert folder.frozen == context.fetch(pretrained)
    assert {path.name for path in folder.path.iterdir()} == {"unet", "scheduler", "finetuned_copy.json"}


def test_a_copy_has_the_tensors_of_the_pretrained_model(tmp_path: Path) -> None:
    context, larger = make_context(tmp_path), {"block_out_channels": [16]}
    pretrained = imported(model(tmp_path, 0), context)
    other = write_tiny_folder(tmp_path / "other", one_level_unet(**larger), **(CONFIG | larger))
    with pytest.raises(ModelFolderError, match="does not hold the tensors of the pretrained model"):
        copied(pretrained, other, context)


@pytest.mark.parametrize("named", [{"prediction_type": "epsilon"}, {}], ids=["named", "by default"])
def test_a_copy_was_trained_on_the_noise_of_the_pretrained_model(named: dict[str, str], tmp_path: Path) -> None:
    context, sources = make_context(tmp_path), [model(tmp_path, seed) for seed in range(2)]
    for source, kind in zip(sources, ({"prediction_type": "v_prediction"}, named), strict=True):
        file = source / "scheduler" / "scheduler_config.json"
        config = json.loads(file.read_text())
        config.pop("prediction_type", None)
        file.write_text(json.dumps(config | kind))
    with pytest.raises(ModelFolderError, match=r"prediction_type as 'epsilon', .* trained on other noise"):
        copied(imported(sources[0], context), sources[1], context)


@pytest.mark.parametrize("is_pickled", [False, True])
def test_the_checks_of_a_recipe_look_at_its_copies(is_pickled: bool, tmp_path: Path) -> None:
    sources = [model(tmp_path, seed) for seed in range(3)]
    for weights in tmp_path.rglob("*.safetensors") if is_pickled else ():
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    settings = {"copies": [str(source) for source in sources[1:]], "segments.count": 2}
    settings["pretrained"] = {"source": str(sources[0]), "allow_pickle": is_pickled}
    recipe = load_recipe("digits", [f"{name}={json.dumps(value)}" for name, value in settings.items()])
    checks = dict(RecipeChecks(recipe, make_context(tmp_path / "home").settings))
    assert checks["model"]().endswith("a DDPMPipeline, and 2 copies of it")
    shutil.rmtree(sources[2])
    with pytest.raises(ModelFolderError, match="model 2' is no folder"):
        checks["model"]()
