"""A LoRA expert as the whole model that it is: theta_0 + B A, one tensor at a time."""

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch

from deme_core.checkpoint import Checkpoint, TensorInfo, tensor_infos
from deme_core.errors import ModelFolderError
from deme_core.lora.factors import LoraFactors


class LoraExpert:
    """Reads like a `Checkpoint` of theta_i; nothing is computed before it is asked for, and nothing is kept.

    Args:
        base: theta_0.
        factors: of each layer that the adapter changes, on the device of ``base``.

    Raises:
        ModelFolderError: the factors do not fit the layers of ``base``.
    """

    def __init__(self, base: Checkpoint | Mapping[str, torch.Tensor], factors: Mapping[str, LoraFactors]) -> None:
        self.base = base
        self.factors = {f"{layer}.weight": each for layer, each in factors.items()}
        for name, each in self.factors.items():
            shape = (len(each.up), *each.down.shape[1:])
            if name not in base or self.infos[name].shape != shape:
                raise ModelFolderError(f"The LoRA has factors for {name} {shape}, which the pretrained model lacks.")

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __contains__(self, name: str) -> bool:
        return name in self.base

    def __getitem__(self, name: str) -> torch.Tensor:
        """Returns theta_0 + B A, float32; theta_0 itself where the adapter changes nothing."""
        if name not in self.factors:
            return self.base[name]
        return self.base[name].float() + self.factors[name].product()

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor: those of theta_0."""
        return self.base.infos if isinstance(self.base, Checkpoint) else tensor_infos(self.base)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all tensors."""
        return {name: self[name] for name in self}

    def changes(self, name: str) -> bool:
        """Whether the tensor differs from that of theta_0."""
        return name in self.factors

    def on(self, base: Mapping[str, torch.Tensor]) -> "LoraExpert":
        """Returns the expert of an equal theta_0 that lies elsewhere."""
        factors = {name.removesuffix(".weight"): each.to(base[name].device) for name, each in self.factors.items()}
        return LoraExpert(base, factors)
