"""Which files of a model are needed: the hub has each part in several precisions and for several frameworks."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from deme_core.model_json import INDEX_NAME, SUFFIXES, variant_of

_WEIGHTS = (".safetensors", ".bin")
_PLAIN = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
# model.fp16.safetensors, diffusion_pytorch_model.non_ema-00001-of-00002.safetensors; or, as diffusers once had shards,
# diffusion_pytorch_model-00001-of-00002.fp16.safetensors.
_VARIANT = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?\.[^.]+\.(safetensors|bin)")
_INDEX_OF_VARIANT = re.compile(r".+\.index\.[^.]+\.json|.+\.(safetensors|bin)\.[^.]+\.index\.json")


def needed_files(names: Iterable[str]) -> list[str]:
    """Returns those of a model's files that stock diffusers loads: pickled weights only in a folder without others.

    Of a part that has no plain weights, those of one half precision in safetensors.

    Args:
        names: POSIX paths within the model's folder.
    """
    paths = [PurePosixPath(name) for name in names if name.endswith(SUFFIXES)]
    plain = [path for path in paths if not _VARIANT.fullmatch(path.name) and not _INDEX_OF_VARIANT.fullmatch(path.name)]
    halves = _halves(set(paths) - set(plain), {path.parent for path in plain if _PLAIN.fullmatch(path.name)})
    paths = plain + halves
    has_parts = any(path.suffix in _WEIGHTS and len(path.parts) > 1 for path in paths)
    if has_parts and PurePosixPath(INDEX_NAME) in paths:  # Weights beside the index are the whole model in one file.
        paths = [path for path in paths if path.suffix not in _WEIGHTS or len(path.parts) > 1]
    safe = {path.parent for path in paths if path.suffix == ".safetensors"}
    return sorted(str(path) for path in paths if path.suffix != ".bin" or path.parent not in safe)


def _halves(variants: set[PurePosixPath], has_plain: set[PurePosixPath]) -> list[PurePosixPath]:
    """Returns the files of variants that stand for the plain weights which their folders miss."""
    safe = [path for path in variants if ".safetensors" in path.name and path.parent not in has_plain]
    chosen: dict[PurePosixPath, str] = {}
    for path in sorted(safe):
        if (variant := variant_of(path.name)) and path.suffix in _WEIGHTS:
            chosen[path.parent] = max(chosen.get(path.parent, variant), variant)  # fp16 before bf16.
    return [path for path in safe if variant_of(path.name) == chosen.get(path.parent, "")]
