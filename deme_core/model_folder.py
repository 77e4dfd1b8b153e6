"""Model folders in the diffusers layout: found, checked, loaded and written.

Both layouts of the hub are read: ``unet/`` and ``scheduler/`` beside ``model_index.json``, and everything in one
folder. What is written is always the first, and loads in stock diffusers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deme_core.checkpoint import Checkpoint, TensorInfo, check_same_tensors, save_tensors
from deme_core.errors import IncompatibleCheckpointsError, ModelFolderError
from deme_core.projection import attach_projections, fold_projections, is_projection

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_PICKLE_NAME = "diffusion_pytorch_model.bin"
_MODEL_CLASSES = ("UNet2DModel",)
# Attention layers were renamed in diffusers 0.17; google/ddpm-* were saved before.
_RENAMED_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class ModelFolder:
    """Where the parts of a model lie, and its two configs.

    Attributes:
        path: the folder as it was given.
        weights: the safetensors files, or the one pickled file.
        unet_config: config.json of the denoiser.
        scheduler_config: scheduler_config.json.
    """

    path: Path
    weights: tuple[Path, ...]
    unet_config: dict[str, Any]
    scheduler_config: dict[str, Any]

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return int(self.scheduler_config.get("num_train_timesteps", 1000))

    def checkpoint(self) -> Checkpoint:
        """Opens the weights as they are stored."""
        return Checkpoint(*self.weights)


def open_model_folder(path: Path, *, allow_pickle: bool = False) -> ModelFolder:
    """Finds the parts of the model in ``path``.

    Raises:
        ModelFolderError: a file is missing or damaged, weights are pickled and that was not allowed, or the
            denoiser is of a class DeMe does not know.
    """
    if not path.is_dir():
        raise ModelFolderError(f"There is no model folder {path}.")
    unet = path / "unet" if (path / "unet").is_dir() else path
    scheduler = path / "scheduler" if (path / "scheduler").is_dir() else path
    config = _read_json(unet / "config.json")
    if config.get("_class_name") not in _MODEL_CLASSES:
        raise ModelFolderError(
            f"{unet / 'config.json'} describes a {config.get('_class_name')}; known are {', '.join(_MODEL_CLASSES)}."
        )
    return ModelFolder(
        path=path,
        weights=_find_weights(unet, allow_pickle=allow_pickle),
        unet_config=config,
        scheduler_config=_read_json(scheduler / "scheduler_config.json"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing; a model folder needs it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} does not hold a JSON object.")
    return content


def _find_weights(folder: Path, *, allow_pickle: bool) -> tuple[Path, ...]:
    if (index := folder / f"{WEIGHTS_NAME}.index.json").is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFolderError(f"{index} has no weight_map, which names the files of the weights.")
        files = tuple(folder / name for name in sorted(set(weight_map.values())))
        if absent := [file.name for file in files if not file.is_file()]:
            raise ModelFolderError(f"{folder} misses {', '.join(absent)}, which {index.name} names.")
        return files
    if (folder / WEIGHTS_NAME).is_file():
        return (folder / WEIGHTS_NAME,)
    if not (folder / _PICKLE_NAME).is_file():
        raise ModelFolderError(f"{folder / WEIGHTS_NAME} is missing; a model folder needs it.")
    if not allow_pickle:
        raise ModelFolderError(
            f"{folder / _PICKLE_NAME} is pickled, which can run code; convert it to safetensors or set "
            "pretrained.allow_pickle: true."
        )
    return (folder / _PICKLE_NAME,)


def load_tensors(folder: ModelFolder) -> dict[str, torch.Tensor]:
    """Returns the stored tensors under the names that diffusers uses today."""
    if folder.weights[0].suffix == ".bin":
        try:
            tensors = torch.load(folder.weights[0], map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged or unsafe file
            raise ModelFolderError(f"{folder.weights[0]} cannot be read safely ({error}).") from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ModelFolderError(f"{folder.weights[0]} does not hold named tensors and nothing else.")
    else:
        tensors = folder.checkpoint().tensors()
    return {_current_name(name): tensor for name, tensor in tensors.items()}


def _current_name(name: str) -> str:
    parts = name.split(".")
    if "attentions" in parts and len(parts) >= 2:
        parts[-2] = _RENAMED_LAYERS.get(parts[-2], parts[-2])
    return ".".join(parts)


def build_unet(config: dict[str, Any], *, materialize: bool = True) -> nn.Module:
    """Builds the denoiser that ``config`` describes, with random weights or (not materialized) without any."""
    import diffusers
    from accelerate import init_empty_weights

    model_class = getattr(diffusers, config["_class_name"])
    if materialize:
        return model_class.from_config(config)
    with init_empty_weights(include_buffers=False):
        return model_class.from_config(config)


def load_unet(folder: ModelFolder, *, keep_projections: bool = False) -> nn.Module:
    """Loads the denoiser in float32, every tensor accounted for.

    Args:
        folder: the model; an expert's channel projections are folded in unless ``keep_projections``.
        keep_projections: return the model with its projections attached.

    Raises:
        ModelFolderError: the weights do not have the names and shapes that the config gives.
    """
    tensors = load_tensors(folder)
    model = build_unet(folder.unet_config, materialize=False)
    if keep_projections:
        attach_projections(model)
    elif any(is_projection(name) for name in tensors):
        tensors = fold_projections(tensors)
    try:
        check_same_tensors(
            str(folder.path), tensor_infos(tensors), tensor_infos(model.state_dict()), reference="its config"
        )
    except IncompatibleCheckpointsError as error:
        raise ModelFolderError(str(error)) from error
    model.load_state_dict({name: tensor.float().clone() for name, tensor in tensors.items()}, assign=True)
    return model


def tensor_infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """Returns shape and dtype of each tensor."""
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write_model_folder(
    path: Path,
    *,
    unet_config: dict[str, Any],
    scheduler_config: dict[str, Any],
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes a folder that ``DDPMPipeline.from_pretrained`` of stock diffusers loads.

    Args:
        path: the folder, made if need be.
        unet_config: config.json of the denoiser.
        scheduler_config: scheduler_config.json.
        tensors: the weights; without them the caller writes to the path that is returned.

    Returns:
        The path of the weights.
    """
    scheduler_class = scheduler_config.get("_class_name", "DDPMScheduler")
    index = {
        "_class_name": "DDIMPipeline" if scheduler_class == "DDIMScheduler" else "DDPMPipeline",
        "_diffusers_version": unet_config.get("_diffusers_version", "0.0.0"),
        "scheduler": ["diffusers", scheduler_class],
        "unet": ["diffusers", unet_config["_class_name"]],
    }
    weights = path / "unet" / WEIGHTS_NAME
    weights.parent.mkdir(parents=True, exist_ok=True)
    (path / "scheduler").mkdir(exist_ok=True)
    _write_json(path / "model_index.json", index)
    _write_json(path / "unet" / "config.json", {k: v for k, v in unet_config.items() if k != "_name_or_path"})
    _write_json(path / "scheduler" / "scheduler_config.json", scheduler_config)
    if tensors is not None:
        save_tensors(weights, tensors)
    return weights


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
