"""The index of a model folder: which pipeline it holds, of which family, and which parts stay frozen."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_core.errors import ModelFolderError
from deme_core.families import FAMILIES, Adapter, Unconditional
from deme_core.families.frozen_parts import FrozenPartsAdapter
from deme_core.model_json import INDEX_NAME, is_plain_name, read_json

# In place of the index, beside the denoiser of a finetuned copy.
COPY_NAME = "finetuned_copy.json"


@dataclass(frozen=True)
class PipelineIndex:
    """What a folder says of itself.

    Attributes:
        family: what DeMe knows of such models.
        pipeline: class of the pipeline; None for a model on pixels, which the pipeline of any sampler loads.
        frozen_parts: subfolders besides denoiser and scheduler.
        pretrained: for a finetuned copy, which has no frozen parts, digest of the artifact that holds them.
        lora_base: for a copy that is a LoRA adapter, digest of the pretrained weights.
    """

    family: type[Adapter]
    pipeline: str | None = None
    frozen_parts: tuple[str, ...] = ()
    pretrained: str | None = None
    lora_base: str | None = None


def read_index(path: Path) -> PipelineIndex:
    """Returns what the folder ``path`` holds.

    Raises:
        ModelFolderError: the index is damaged, no family knows the pipeline, a part that it needs is missing, or one is
            of another library than diffusers and transformers.
    """
    if (path / COPY_NAME).is_file():
        copy = read_json(path / COPY_NAME)
        pipeline, digest, base = copy.get("pipeline"), copy.get("pretrained"), copy.get("lora_base")
        family = _known(path / COPY_NAME, pipeline)
        if not _is_digest(digest) or not (base is None or _is_digest(base)):
            raise ModelFolderError(f"{path / COPY_NAME} names no pretrained model; fetch it again.")
        return PipelineIndex(family, pipeline, (), digest, base)
    index = read_json(path / INDEX_NAME) if (path / INDEX_NAME).is_file() else {}
    named = tuple(sorted(name for name, part in index.items() if isinstance(part, list) and part and part[0]))
    if elsewhere := [name for name in named if not is_plain_name(name)]:
        raise ModelFolderError(f"{path / INDEX_NAME} names {elsewhere[0]!r}, which is no part of the folder.")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str | None):
        raise _unknown(path / INDEX_NAME, pipeline)
    if pipeline not in FAMILIES and set(named) - {"unet", "scheduler"}:
        raise _unknown(path / INDEX_NAME, pipeline)
    # Any sampler's pipeline will do for a model on pixels, as PNDMPipeline; its denoiser says whether it is one.
    family = FAMILIES.get(str(pipeline), Unconditional)
    # Some models on pixels have all parts, and the index, in one folder: google/ddpm-cifar10-32.
    if index and not any((path / name).exists() for name in (family.denoiser_part, "config.json")):
        raise ModelFolderError(f"{path} holds no {family.denoiser_part}, which a {pipeline} needs.")
    if family is Unconditional:
        return PipelineIndex(family)
    if missing := [part for part in family.frozen_parts if part not in named or not (path / part).is_dir()]:
        raise ModelFolderError(f"{path} misses {', '.join(missing)}, which a {pipeline} needs.")
    if issubclass(family, FrozenPartsAdapter):
        family.classes(index, path / INDEX_NAME)
    parts = tuple(name for name in named if name not in (family.denoiser_part, "scheduler") and (path / name).is_dir())
    return PipelineIndex(family, pipeline, parts)


def _known(file: Path, pipeline: Any) -> type[Adapter]:
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise _unknown(file, pipeline)
    return FAMILIES[pipeline]


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _unknown(file: Path, pipeline: Any) -> ModelFolderError:
    return ModelFolderError(f"{file} describes a {pipeline}; known are {', '.join(sorted(FAMILIES))}.")
