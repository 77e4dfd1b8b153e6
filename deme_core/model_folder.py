"""Model folders in the diffusers layout: found, checked and loaded.

Both layouts of the hub are read: ``unet/`` or ``transformer/`` and ``scheduler/`` beside ``model_index.json``, and, for
models on pixels, everything in one folder.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deme_core.checkpoint import Checkpoint, TensorInfo, check_same_tensors, tensor_infos
from deme_core.errors import IncompatibleCheckpointsError, ModelFolderError
from deme_core.families import FAMILIES, Adapter
from deme_core.lora.expert import LoraExpert
from deme_core.lora.factors import LORA_NAME, LoraFactors, read_factors
from deme_core.model_digest import tensors_digest
from deme_core.model_json import (
    INDEX_NAME,
    PICKLE_NAME,
    PICKLE_SUFFIX,
    PRECISIONS,
    WEIGHTS_NAME,
    check_part,
    is_pickled,
    read_json,
    shard_names,
)
from deme_core.needed_files import needed_files
from deme_core.pipeline_index import COPY_NAME, PipelineIndex, read_index
from deme_core.projection import fold_projections, is_projection

# What decides about the noise that a model is trained on; the shift of flow matching is the sampler's alone.
_NOISE = (
    "num_train_timesteps",
    "prediction_type",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
# Attention layers were renamed in diffusers 0.17; google/ddpm-* were saved before.
_RENAMED_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class ModelFolder:
    """Where the parts of a model lie, and its two configs.

    Attributes:
        path: the folder as it was given.
        index: pipeline, family and frozen parts.
        weights: the safetensors files, or the one pickled file; of a LoRA, the adapter.
        denoiser_config: config.json of the denoiser.
        scheduler_config: scheduler_config.json.
        frozen: folder that holds the frozen parts; None if it is not known, as for a finetuned copy by itself.
    """

    path: Path
    index: PipelineIndex
    weights: tuple[Path, ...]
    denoiser_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    frozen: Path | None

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return int(self.scheduler_config.get("num_train_timesteps", 1000))

    def checkpoint(self) -> Checkpoint:
        """Opens the weights, under the names that diffusers uses today."""
        return Checkpoint(*self.weights, rename=_current_name)

    def expert(self, base: "ModelFolder") -> Checkpoint | LoraExpert:
        """Opens a finetuned copy of ``base``: its weights, or what its LoRA adapter makes of those of ``base``.

        Raises:
            ModelFolderError: it was trained on other noise, or the adapter on other pretrained weights.
        """
        _check_noise(self, base)
        if self.index.lora_base is None:
            return self.checkpoint()
        if (found := weights_digest(base)) != self.index.lora_base:
            raise ModelFolderError(
                f"{self.path} is a LoRA of the pretrained weights {self.index.lora_base[:12]}, not of {base.path}, "
                f"whose digest is {found[:12]}; give the model that it was trained on."
            )
        return LoraExpert(base.checkpoint(), self.lora_factors())

    def lora_factors(self) -> dict[str, LoraFactors]:
        """Returns the adapter of a copy that is a LoRA, by layer."""
        return read_factors(self.weights[0], part=self.index.family.denoiser_part)

    def adapter(self, device: torch.device | str = "cpu") -> Adapter:
        """Returns all that DeMe knows of the model besides its denoiser's weights."""
        return self.index.family(
            denoiser_config=self.denoiser_config,
            scheduler_config=self.scheduler_config,
            pipeline=self.index.pipeline,
            frozen=self.frozen,
            device=device,
        )

    def frozen_files(self, *, allow_pickle: bool = False) -> list[Path]:
        """Returns the files of the frozen parts, and the pipeline's index.

        Raises:
            ModelFolderError: the only weights of a part are pickled, and that was not allowed; or what loads it would
                read other files than those of its folder.
        """
        parts = self.index.frozen_parts
        for part in parts:
            check_part(self.path / part)
        present = [file.relative_to(self.path) for part in parts for file in (self.path / part).rglob("*")]
        files = [self.path / name for name in needed_files(name.as_posix() for name in present)]
        pickled = [file for file in files if is_pickled(file)]
        if pickled and not allow_pickle:
            raise _pickled(pickled[0])
        return [self.path / INDEX_NAME, *files] if parts else []


def open_model_folder(path: Path, *, allow_pickle: bool = False) -> ModelFolder:
    """Finds the parts of the model in ``path``.

    Args:
        path: the folder.
        allow_pickle: accept pickled weights, of frozen parts, too.

    Raises:
        ModelFolderError: a file is missing or damaged, weights are pickled and that was not allowed, what would load a
            frozen part would leave its folder, or the model is of a family or class that DeMe does not know.
    """
    if path.is_file():
        raise ModelFolderError(
            f"{path} is a file, and a model is a folder; load it in diffusers (from_single_file; a LoRA into its "
            "pipeline by load_lora_weights and fuse_lora), call save_pretrained, and give that folder."
        )
    if not path.is_dir():
        raise ModelFolderError(f"There is no model folder {path}.")
    lora = next((path / name for name in (LORA_NAME, "adapter_config.json") if (path / name).is_file()), None)
    if lora and not (path / INDEX_NAME).is_file() and not (path / COPY_NAME).is_file():
        raise ModelFolderError(
            f"{lora} is a LoRA, which is not taken; load it into its pipeline in diffusers (load_lora_weights, "
            "fuse_lora), call save_pretrained, and give that folder."
        )
    index = read_index(path)
    denoiser, scheduler = _part(path, index.family.denoiser_part), _part(path, "scheduler")
    config = read_json(denoiser / "config.json")
    if (found := config.get("_class_name")) not in (known := index.family.denoiser_classes):
        parts = [family.denoiser_part for family in FAMILIES.values() if found in family.denoiser_classes]
        if parts and not (path / INDEX_NAME).is_file():
            raise ModelFolderError(
                f"{denoiser} holds a {found}, the denoiser of a pipeline alone; give the folder of a whole pipeline in "
                f"which it is {parts[0]}/."
            )
        raise ModelFolderError(f"{denoiser / 'config.json'} describes a {found}; known are {', '.join(known)}.")
    scheduler_config = read_json(scheduler / "scheduler_config.json")
    scheduler_config.pop("_use_default_values", None)  # In folders that were written by DeMe until 2026-11-28.
    if problem := index.family.unsupported(config, scheduler_config):
        raise ModelFolderError(f"{path} has {problem}; DeMe cannot finetune it.")
    folder = ModelFolder(
        path=path,
        index=index,
        weights=(path / LORA_NAME,) if index.lora_base else _find_weights(denoiser, allow_pickle=allow_pickle),
        denoiser_config=config,
        scheduler_config=scheduler_config,
        frozen=None if index.pretrained else path,
    )
    folder.frozen_files(allow_pickle=allow_pickle)  # For its checks, since whoever opens a model may load it.
    return folder


def check_copy(copy: ModelFolder, pretrained: ModelFolder) -> None:
    """Raises a ModelFolderError unless a model from elsewhere can be a finetuned copy of ``pretrained``."""
    if copy.index.lora_base is not None:
        raise ModelFolderError(f"{copy.path} holds a LoRA adapter alone; give a whole model.")
    try:
        check_same_tensors(str(copy.path), load_infos(copy), load_infos(pretrained), reference="the pretrained model")
    except IncompatibleCheckpointsError as error:
        raise ModelFolderError(str(error)) from error
    _check_noise(copy, pretrained)


def _check_noise(copy: ModelFolder, pretrained: ModelFolder) -> None:
    from diffusers import DDPMScheduler

    defaults = inspect.signature(DDPMScheduler).parameters
    for name in _NOISE:
        found, expected = (f.scheduler_config.get(name, defaults[name].default) for f in (copy, pretrained))
        if found != expected:
            raise ModelFolderError(
                f"The scheduler_config.json of {copy.path} gives {name} as {found!r}, that of the pretrained model "
                f"{expected!r}: it was trained on other noise, and is no copy of it."
            )


def _part(path: Path, name: str) -> Path:
    return path / name if (path / name).is_dir() else path


def _find_weights(folder: Path, *, allow_pickle: bool) -> tuple[Path, ...]:
    if found := _safetensors(folder, WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json"):
        return found
    if (folder / PICKLE_NAME).is_file() and allow_pickle:
        return (folder / PICKLE_NAME,)
    if (folder / PICKLE_NAME).is_file():
        raise _pickled(folder / PICKLE_NAME)
    stem, suffix = WEIGHTS_NAME.rsplit(".", 1)
    for precision in PRECISIONS:
        names = f"{stem}.{precision}.{suffix}", f"{WEIGHTS_NAME}.index.{precision}.json"
        if found := _safetensors(folder, *names):
            return found
    raise ModelFolderError(f"{folder / WEIGHTS_NAME} is missing; a model folder needs it.")


def _safetensors(folder: Path, weights: str, index_name: str) -> tuple[Path, ...]:
    if (index := folder / index_name).is_file():
        files = tuple(folder / name for name in shard_names(read_json(index), str(index)))
        if absent := [file.name for file in files if not file.is_file()]:
            raise ModelFolderError(f"{folder} misses {', '.join(absent)}, which {index.name} names.")
        return files
    return (folder / weights,) if (folder / weights).is_file() else ()


def _pickled(file: Path) -> ModelFolderError:
    return ModelFolderError(
        f"{file} is pickled, which can run code; convert it to safetensors (load the model in diffusers and call "
        "save_pretrained) or, in a recipe, set pretrained.allow_pickle: true."
    )


def load_tensors(folder: ModelFolder) -> dict[str, torch.Tensor]:
    """Returns the stored tensors under the names that diffusers uses today; of a LoRA, those of the model it makes.

    Raises:
        ModelFolderError: the file is damaged; or it is a LoRA, and the pretrained model is another or not at hand.
    """
    if folder.index.lora_base is not None:
        if folder.frozen is None:
            raise ModelFolderError(f"{folder.path} holds a LoRA adapter alone; give a whole {folder.index.pipeline}.")
        return folder.expert(open_model_folder(folder.frozen)).tensors()
    pickled = folder.weights[0].suffix == PICKLE_SUFFIX
    if not pickled:
        return folder.checkpoint().tensors()
    return {_current_name(name): tensor for name, tensor in read_pickled_tensors(folder.weights[0]).items()}


def load_infos(folder: ModelFolder) -> dict[str, TensorInfo]:
    """Returns shape and dtype of every stored tensor; of pickled weights by loading them."""
    is_pickled = folder.weights[0].suffix == PICKLE_SUFFIX
    return tensor_infos(load_tensors(folder)) if is_pickled else folder.checkpoint().infos


def read_pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Returns the named tensors of a pickled file, of which no code is run.

    Raises:
        ModelFolderError: it is damaged, or holds anything else.
    """
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        raise ModelFolderError(f"{file} cannot be read safely ({error}).") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ModelFolderError(f"{file} does not hold named tensors and nothing else.")
    return tensors


def weights_digest(folder: ModelFolder) -> str:
    """Returns the digest of the denoiser's weights in float32, whatever their names and dtypes in the file.

    It is computed once per process and files, since every candidate of a search may ask.
    """
    stats = tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.weights)
    if stats not in _DIGESTS:
        _DIGESTS[stats] = tensors_digest({name: tensor.float() for name, tensor in load_tensors(folder).items()})
    return _DIGESTS[stats]


_DIGESTS: dict[tuple[tuple[Path, int, int], ...], str] = {}


def _current_name(name: str) -> str:
    parts = name.split(".")
    if "attentions" in parts and len(parts) >= 2:
        parts[-2] = _RENAMED_LAYERS.get(parts[-2], parts[-2])
    return ".".join(parts)


def build_denoiser(config: dict[str, Any], *, materialize: bool = True) -> nn.Module:
    """Builds the denoiser that ``config`` describes, with random weights or (not materialized) without any."""
    import diffusers
    from accelerate import init_empty_weights

    model_class = getattr(diffusers, config["_class_name"])
    if materialize:
        return model_class.from_config(config)
    with init_empty_weights(include_buffers=False):
        return model_class.from_config(config)


def load_denoiser(folder: ModelFolder) -> nn.Module:
    """Loads the denoiser in float32, every tensor accounted for; an expert's channel projections are folded in.

    Raises:
        ModelFolderError: the weights do not have the names and shapes that the config gives.
    """
    tensors = load_tensors(folder)
    try:
        model = build_denoiser(folder.denoiser_config, materialize=False)
    except Exception as error:  # diffusers raises many kinds for what it cannot build.
        raise ModelFolderError(f"The config of {folder.path} describes no model ({error}); fetch it again.") from error
    if any(is_projection(name) for name in tensors):
        tensors = fold_projections(tensors)
    try:
        check_same_tensors(
            str(folder.path), tensor_infos(tensors), tensor_infos(model.state_dict()), reference="its config"
        )
    except IncompatibleCheckpointsError as error:
        raise ModelFolderError(str(error)) from error
    model.load_state_dict({name: tensor.float().clone() for name, tensor in tensors.items()}, assign=True)
    return model
