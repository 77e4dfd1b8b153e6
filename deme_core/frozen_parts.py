"""The frozen parts of a pipeline as files: which of them it needs."""

import re
from pathlib import Path

from deme_core.errors import ModelFolderError

# Of the hub's many files for one part: not the half-precision or non-EMA variants, nor those of other frameworks.
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors")
_PICKLED = ("pytorch_model.bin", "diffusion_pytorch_model.bin")


def part_files(folder: Path, *, allow_pickle: bool = False) -> list[Path]:
    """Returns the files of one frozen part that stock diffusers loads, sorted.

    Args:
        folder: the part's.
        allow_pickle: take pickled weights where there are no others.

    Raises:
        ModelFolderError: its only weights are pickled, and that was not allowed.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix in _SUFFIXES)
    files = [file for file in files if file.suffix != ".safetensors" or _WEIGHTS.fullmatch(file.name)]
    pickled = [folder / name for name in _PICKLED if (folder / name).is_file()]
    if not pickled or any(file.suffix == ".safetensors" for file in files):
        return files
    if not allow_pickle:
        raise ModelFolderError(
            f"{pickled[0]} is pickled, which can run code; convert it to safetensors or set "
            "pretrained.allow_pickle: true."
        )
    return [*files, *pickled]
