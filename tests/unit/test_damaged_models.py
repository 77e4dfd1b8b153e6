"""Configs and parts of foreign models that are damaged, or made to be: one sentence each, from opening to images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deme_core.errors import ModelFolderError
from deme_core.generate import SingleModel, generate
from deme_core.model_folder import load_denoiser, open_model_folder
from deme_core.prompts import Prompts
from deme_core.sampling import Sampling
from tests.tiny_models import one_level_unet, write_tiny_folder
from tests.tiny_pipelines import save_pipeline

ONE_LEVEL = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("models") / "pixels", one_level_unet(), **ONE_LEVEL)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("StableDiffusionPipeline", tmp_path_factory.mktemp("models") / "latents")


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("StableDiffusion3Pipeline", tmp_path_factory.mktemp("models") / "flow")


def edit(file: Path, **changes: Any) -> None:
    """Changes a config; what becomes ... is left out."""
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def make_image(path: Path) -> torch.Tensor:
    """Returns an image of the model, as ``deme generate`` makes it; opened first, as a run does."""
    folder = open_model_folder(path)
    adapter = folder.adapter()
    assert adapter.image_shape
    model, sampling = SingleModel(load_denoiser(folder).eval()), Sampling(adapter.noise_process.samplers[0], 4)
    prompts = Prompts(("a cat",), {}, "digest") if adapter.conditioned_on == "captions" else None
    return next(generate(model, adapter, sampling, seed=0, indices=[0], prompts=prompts))


def test_whole_models_make_images(pixels: Path, latents: Path, flow: Path) -> None:
    assert [tuple(make_image(path).shape) for path in (pixels, latents, flow)] == [(1, 1, 8, 8), *[(1, 3, 16, 16)] * 2]


@pytest.mark.parametrize(
    "change",
    [
        {"sample_size": ...},
        {"sample_size": "a"},
        {"sample_size": True},
        {"sample_size": [1, 2, 3]},
        {"sample_size": [8, None]},
        {"sample_size": 0},
        {"sample_size": 10**9},
        {"in_channels": ...},
        {"in_channels": None},
        {"in_channels": "3"},
    ],
    ids=str,
)
def test_a_damaged_size(change: dict[str, Any], pixels: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pixels, tmp_path / "model")
    edit(folder / "unet" / "config.json", **change)
    with pytest.raises(ModelFolderError, match=rf"{next(iter(change))}|configs of the model give its images"):
        make_image(folder)


@pytest.mark.parametrize(
    "change", [{"shift": "a"}, {"use_dynamic_shifting": True, "base_shift": "a"}, {"num_train_timesteps": "a"}], ids=str
)
def test_a_damaged_flow(change: dict[str, Any], flow: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(flow, tmp_path / "model")
    edit(folder / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(ModelFolderError, match=r"scheduler_config\.json of this Stable|num_train_timesteps"):
        make_image(folder)


def index(**parts: list[str]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", **parts)


def config(part: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / part / "config.json", **changes)


def text(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(content)

    return write


def gone(pattern: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return remove


DAMAGES: dict[str, Callable[[Path], None]] = {
    "vae config is a list": text("vae/config.json", "[]"),
    "vae config is gone": gone("vae/config.json"),
    "vae has no blocks": config("vae", block_out_channels=...),
    "vae has blocks without end": config("vae", block_out_channels=[8] * 10**4),
    "vae has an odd number of channels": config("vae", in_channels="a"),
    "vae scales by text": config("vae", scaling_factor="a"),
    "vae shifts by text": config("vae", shift_factor="a"),
    "vae has other latents": config("vae", latent_channels=8),
    "vae is a text encoder": index(vae=["transformers", "CLIPTextModel"]),
    "vae weights are gone": gone("vae/*.safetensors"),
    "text encoder config is no JSON": text("text_encoder/config.json", "{"),
    "text encoder of width -1": config("text_encoder", hidden_size=-1),
    "text encoder knows few words": config("text_encoder", vocab_size=3),
    "text encoder weights are gone": gone("text_encoder/*.safetensors"),
    "text encoder weights are noise": text("text_encoder/model.safetensors", "x" * 100),
    "tokenizer is gone": gone("tokenizer/*"),
    "tokenizer is no JSON": text("tokenizer/tokenizer.json", "{"),
    "tokenizer without length": text("tokenizer/tokenizer_config.json", "{}"),
    "tokenizer is a function": index(tokenizer=["transformers", "pipeline"]),
    "tokenizer of no class": index(tokenizer=["transformers", "Nope"]),
    "tokenizer is a pipeline": index(tokenizer=["diffusers", "DiffusionPipeline"]),
    "tokenizer is a model": index(tokenizer=["transformers", "CLIPTextModel"]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_part(damage: Callable[[Path], None], latents: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(latents, tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelFolderError, match=str(folder)) as raised:
        make_image(folder)
    assert "\n" not in str(raised.value)
