"""The factors of a LoRA adapter, and the file that holds them: as diffusers reads and writes it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from deme_core.checkpoint import Checkpoint, save_tensors
from deme_core.errors import ModelFolderError

LORA_NAME = "pytorch_lora_weights.safetensors"
# In the file's header, beside the tensors: digest of the pretrained weights.
_BASE = "deme.pretrained_weights"
_KEY = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """What is added to the weight of one layer: the product B A, its scale included in B.

    Attributes:
        down: A, float32 (r, in) of a linear layer, (r, in, k, k) of a convolution.
        up: B, float32 (out, r), or (out, r, 1, 1).
    """

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        """R."""
        return len(self.down)

    def product(self) -> torch.Tensor:
        """Returns B A in the shape of the layer's weight."""
        return (self.up.flatten(1) @ self.down.flatten(1)).view(len(self.up), *self.down.shape[1:])

    def to(self, device: torch.device | str) -> "LoraFactors":
        """Returns the factors on ``device``."""
        return LoraFactors(self.down.to(device), self.up.to(device))


def write_factors(path: Path, factors: Mapping[str, LoraFactors], *, part: str, base_digest: str) -> None:
    """Writes an adapter that ``load_lora_weights`` of stock diffusers takes.

    Nothing in it says alpha, and without it diffusers, like other tools, scales by one.

    Args:
        path: the file.
        factors: by the name of the layer.
        part: subfolder of the denoiser in the pipeline, ``unet`` or ``transformer``.
        base_digest: digest of the pretrained weights.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer, each in factors.items():
        tensors |= {f"{part}.{layer}.lora_A.weight": each.down, f"{part}.{layer}.lora_B.weight": each.up}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, metadata={_BASE: base_digest})


def read_factors(path: Path, *, part: str) -> dict[str, LoraFactors]:
    """Returns the factors by the name of the layer, memory-mapped.

    Raises:
        ModelFolderError: the file is missing, damaged, or not an adapter as `write_factors` writes it.
    """
    if not path.is_file():
        raise ModelFolderError(f"{path} is missing; a copy that was finetuned as a LoRA needs it.")
    checkpoint = Checkpoint(path)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in checkpoint:
        match = _KEY.fullmatch(name.removeprefix(f"{part}."))
        if match is None or not name.startswith(f"{part}."):
            raise ModelFolderError(f"{path} holds {name}, which is no LoRA factor of the {part}.")
        found.setdefault(match[1], {})[match[2]] = checkpoint[name]
    for layer, pair in found.items():
        if pair.keys() != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1]:
            raise ModelFolderError(f"{path} does not hold both LoRA factors of {layer}, of one rank.")
    return {layer: LoraFactors(pair["A"], pair["B"]) for layer, pair in found.items()}
