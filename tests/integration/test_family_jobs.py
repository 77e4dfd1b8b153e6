"""The whole method on a tiny pipeline of each family: import, finetune, merge, fold, load in stock diffusers, score."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from rich.console import Console

from deme_core.errors import InputError, ModelFolderError
from deme_core.families import FAMILIES
from deme_core.model_folder import open_model_folder
from deme_core.projection import fold_into, projection_key
from deme_core.recipe import DatasetSpec, MethodSpec
from flows.model_commands import generate_images, merge_models
from tasks.jobs import (
    HeldoutJob,
    LossJob,
)
from tests.family_method import WEIGHTS, Method, files_below, two_classes
from tests.tiny_models import same_bits
from tests.tiny_pipelines import PIPELINES, save_pipeline

EDGES = (0, 400, 1000)
every_pipeline = pytest.mark.parametrize("name", PIPELINES)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetSpec:
    return two_classes(tmp_path_factory.mktemp("images"))


def merged_by_hand(pretrained: Path, experts: list[Path]) -> dict[str, torch.Tensor]:
    """Returns theta_0 + sum_i w_i (theta_i - theta_0), tensor by tensor, projections summed alike and then folded."""
    start = open_model_folder(pretrained).checkpoint().tensors()
    copies = [open_model_folder(expert).checkpoint().tensors() for expert in experts]
    merged = {}
    for key, tensor in start.items():
        moved = tensor + sum(w * (copy[key] - tensor) for w, copy in zip(WEIGHTS, copies, strict=True))
        if (projection := projection_key(key)) in copies[0]:
            identity = torch.eye(len(copies[0][projection]))
            total = identity + sum(w * (c[projection] - identity) for w, c in zip(WEIGHTS, copies, strict=True))
            moved = fold_into(moved, total)
        merged[key] = moved
    return merged


@every_pipeline
def test_the_whole_method(name: str, tmp_path: Path, dataset: DatasetSpec) -> None:
    method = Method(name, tmp_path, dataset)
    part, context = FAMILIES[name].denoiser_part, method.context
    weights = f"{part}/diffusion_pytorch_model.safetensors"

    imported = context.fetch(method.pretrained.ref)
    assert files_below(imported) == files_below(method.stock)
    for file in files_below(method.stock) - {weights}:
        assert (imported / file).read_bytes() == (method.stock / file).read_bytes(), file

    experts = tuple(method.finetune(low, high).ref for low, high in ((0, 400), (400, 1000)))
    folders = [context.fetch(expert) for expert in experts]
    for folder in folders:
        assert files_below(folder) == {
            "finetuned_copy.json",
            f"{part}/config.json",
            weights,
            "scheduler/scheduler_config.json",
        }

    merged = method.merge(experts)
    merged_folder = context.fetch(merged.ref)
    assert files_below(merged_folder) == files_below(method.stock)
    for file in files_below(method.stock) - {weights}:
        assert (merged_folder / file).read_bytes() == (method.stock / file).read_bytes(), file
    stock_state = getattr(DiffusionPipeline.from_pretrained(merged_folder), part).state_dict()
    expected = merged_by_hand(imported, folders)
    assert stock_state.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(stock_state[key], tensor, atol=1e-6, rtol=1e-5, msg=key)
    assert not all(
        same_bits(tensor, stock_state[key])
        for key, tensor in open_model_folder(imported).checkpoint().tensors().items()
    )

    heldout = method.do(HeldoutJob(model=experts[0], dataset=dataset, edges=EDGES))
    assert all(math.isfinite(loss) for loss in heldout.metrics["bins"])
    loss = LossJob(
        label="candidate",
        pretrained=method.pretrained.ref,
        experts=experts,
        method=MethodSpec(),
        weights=WEIGHTS,
        dataset=dataset,
        segment_edges=EDGES,
    )
    assert all(math.isfinite(value) for value in method.do(loss).metrics["value"])
    scores = {method.score((merged.ref,), None), method.score(experts, EDGES)}
    assert len(scores) == 2
    assert all(math.isfinite(score) for score in scores)


def test_a_finetuned_copy_alone_makes_no_images(tmp_path: Path, dataset: DatasetSpec) -> None:
    method = Method("DiTPipeline", tmp_path, dataset)
    copy = method.context.fetch(method.finetune(0, 1000).ref)
    with pytest.raises(ModelFolderError, match="holds the denoiser of a DiTPipeline alone; give the whole pipeline"):
        open_model_folder(copy).adapter().decode_latents(torch.zeros(1, 4, 8, 8))
    with pytest.raises(
        ModelFolderError, match="holds the denoiser of a finetuned copy alone; give a whole DiTPipeline"
    ):
        merge_models(copy, [copy], "0.5", tmp_path / "merged")
    assert method.context.open_model(method.finetune(0, 1000).ref).frozen == method.context.fetch(method.pretrained.ref)


def test_the_command_line_merges_and_generates_whole_pipelines(tmp_path: Path) -> None:
    pretrained, expert = (save_pipeline("DiTPipeline", tmp_path / name) for name in ("pretrained", "expert"))
    merge_models(pretrained, [expert], "0.5", tmp_path / "merged")
    assert files_below(tmp_path / "merged") == files_below(pretrained)
    settings: dict[str, Any] = {"num_images": 3, "seed": 0, "num_inference_steps": 4, "batch_size": 2}
    for model in ("pretrained", "merged"):
        generate_images(str(tmp_path / model), tmp_path / f"{model}-images", **settings, console=Console(quiet=True))
    made = sorted((tmp_path / "merged-images").iterdir())
    assert [file.name for file in made] == ["000000.png", "000001.png", "000002.png"]
    assert [f.read_bytes() for f in made] == [
        f.read_bytes() for f in sorted((tmp_path / "pretrained-images").iterdir())
    ]


def test_the_command_line_generates_from_prompts(tmp_path: Path) -> None:
    model = save_pipeline("StableDiffusion3Pipeline", tmp_path / "model")
    settings: dict[str, Any] = {"num_images": 2, "seed": 0, "num_inference_steps": 4, "console": Console(quiet=True)}
    with pytest.raises(InputError, match=r"makes images from text; name a file of prompts"):
        generate_images(str(model), tmp_path / "nothing", **settings)
    (tmp_path / "prompts.txt").write_text("a cat\na truck\n")
    prompts = str(tmp_path / "prompts.txt")
    generate_images(str(model), tmp_path / "images", **settings, prompts=prompts, guidance_scale=2.0)
    assert len(list((tmp_path / "images").iterdir())) == 2
