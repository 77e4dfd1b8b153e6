"""Model folders as they are written: in the layout that stock diffusers loads.

The frozen parts of a pipeline are copied byte for byte, but for pickled weights, which become safetensors. Only a
finetuned copy of such a pipeline is written without them, with the digest of the pretrained artifact that holds them;
and of a copy that is a LoRA, the adapter alone.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from deme_core.checkpoint import save_tensors
from deme_core.errors import ModelFolderError
from deme_core.lora.factors import LORA_NAME, LoraFactors, write_factors
from deme_core.model_folder import ModelFolder, read_pickled_tensors, weights_digest
from deme_core.model_json import (
    INDEX_NAME,
    WEIGHTS_NAME,
    is_pickled,
    plain_name,
    read_json,
    safetensors_name,
    variant_of,
)
from deme_core.pipeline_index import COPY_NAME


def write_model_folder(
    path: Path,
    *,
    denoiser_config: dict[str, Any],
    scheduler_config: dict[str, Any],
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes a model on pixels as a folder that ``DDPMPipeline.from_pretrained`` of stock diffusers loads.

    Args:
        path: the folder, made if need be.
        denoiser_config: config.json of the denoiser.
        scheduler_config: scheduler_config.json.
        tensors: the weights; without them the caller writes to the path that is returned.

    Returns:
        The path of the weights.
    """
    scheduler_class = scheduler_config.get("_class_name", "DDPMScheduler")
    index = {
        "_class_name": "DDIMPipeline" if scheduler_class == "DDIMScheduler" else "DDPMPipeline",
        "_diffusers_version": denoiser_config.get("_diffusers_version", "0.0.0"),
        "scheduler": ["diffusers", scheduler_class],
        "unet": ["diffusers", denoiser_config["_class_name"]],
    }
    weights = path / "unet" / WEIGHTS_NAME
    weights.parent.mkdir(parents=True, exist_ok=True)
    (path / "scheduler").mkdir(exist_ok=True)
    _write_json(path / INDEX_NAME, index)
    _write_json(path / "unet" / "config.json", {k: v for k, v in denoiser_config.items() if k != "_name_or_path"})
    _write_json(path / "scheduler" / "scheduler_config.json", scheduler_config)
    if tensors is not None:
        save_tensors(weights, tensors)
    return weights


def write_like(
    path: Path,
    model: ModelFolder,
    *,
    tensors: dict[str, torch.Tensor] | None = None,
    copy_of: str | None = None,
    allow_pickle: bool = False,
) -> Path:
    """Writes a folder like that of ``model``, with other weights.

    Args:
        path: the folder, made if need be.
        model: what it is like; its frozen parts and configs are copied byte for byte, but for pickled weights.
        tensors: weights of the denoiser; without them the caller writes to the path that is returned.
        copy_of: digest of the pretrained artifact: leave the frozen parts out, for they are there.
        allow_pickle: take frozen parts with pickled weights, as safetensors: what reads the folder is asked no more.

    Returns:
        The path of the weights.

    Raises:
        ModelFolderError: ``model`` is a finetuned copy without frozen parts, and a whole folder was asked for.
    """
    if model.index.pretrained and copy_of is None:
        raise ModelFolderError(
            f"{model.path} holds the denoiser of a finetuned copy alone; give a whole {model.index.pipeline}."
        )
    if not model.index.frozen_parts and not model.index.pretrained:
        return write_model_folder(
            path, denoiser_config=model.denoiser_config, scheduler_config=model.scheduler_config, tensors=tensors
        )
    part = model.index.family.denoiser_part
    for name in (f"{part}/config.json", "scheduler/scheduler_config.json"):
        _copy_file(model.path / name, path / name)
    if copy_of is not None:
        _write_json(path / COPY_NAME, {"pipeline": model.index.pipeline, "pretrained": copy_of})
    else:
        for file in model.frozen_files(allow_pickle=allow_pickle):
            _copy_frozen_file(file, path / file.relative_to(model.path))
    if tensors is not None:
        save_tensors(path / part / WEIGHTS_NAME, tensors)
    return path / part / WEIGHTS_NAME


def write_lora_copy(path: Path, model: ModelFolder, factors: dict[str, LoraFactors], *, copy_of: str) -> None:
    """Writes a finetuned copy that is a LoRA: the adapter, and which model it belongs to.

    Args:
        path: the folder, made if need be.
        model: the pretrained model.
        factors: the adapter by layer.
        copy_of: digest of the pretrained artifact.
    """
    part, base = model.index.family.denoiser_part, weights_digest(model)
    _write_json(path / part / "config.json", model.denoiser_config)
    _write_json(path / "scheduler" / "scheduler_config.json", model.scheduler_config)
    pipeline = model.index.pipeline or model.index.family.pipelines[0]
    _write_json(path / COPY_NAME, {"pipeline": pipeline, "pretrained": copy_of, "lora_base": base})
    write_factors(path / LORA_NAME, factors, part=part, base_digest=base)


def _copy_frozen_file(source: Path, destination: Path) -> None:
    pickled = is_pickled(source)
    renamed = safetensors_name if pickled else plain_name
    if not pickled and not variant_of(source.name):
        _copy_file(source, destination)
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination = destination.with_name(renamed(source.name))
    if source.suffix == ".json":
        index = read_json(source)
        names = {name: renamed(shard) for name, shard in index["weight_map"].items()}
        _write_json(destination, index | {"weight_map": names})
    elif not pickled:
        _copy_file(source, destination)
    else:
        save_tensors(destination, read_pickled_tensors(source))


def _copy_file(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # What diffusers keeps of a config in memory alone: `from_config` of another scheduler would drop what it lists.
    content = {name: value for name, value in content.items() if name != "_use_default_values"}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
