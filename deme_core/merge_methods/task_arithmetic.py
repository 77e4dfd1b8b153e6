"""Task arithmetic: theta_0 + sum_i w_i tau_i, tau_i = theta_i - theta_0 (Ilharco et al. 2023, arXiv 2212.04089)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme_core.errors import InputError


@dataclass(frozen=True)
class TaskArithmetic:
    """One weight per expert, the same for all tensors."""

    weights: tuple[float, ...]

    def __call__(self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns theta_0 + sum_i w_i tau_i; see ``TensorMerge``."""
        return weighted_sum(pretrained, finetuned, self.weights)


def weighted_sum(pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Returns (1 - sum_i w_i) theta_0 + sum_i w_i theta_i, float32.

    Zero weights are skipped, so that all w = 0 gives theta_0, and N = 1 with w = 1 gives theta_1, bit for bit.
    """
    check_num_weights(weights, num_experts=len(finetuned))
    if not pretrained.is_floating_point():
        return pretrained
    terms = [(1.0 - sum(weights), pretrained), *zip(weights, finetuned, strict=True)]
    terms = [(weight, tensor) for weight, tensor in terms if weight != 0.0]
    (weight, tensor), *others = terms  # Never empty: the weights of all terms sum to one.
    merged = tensor.float() if weight == 1.0 and not others else torch.mul(tensor.float(), weight)
    for weight, tensor in others:
        merged.add_(tensor.float(), alpha=weight)
    return merged


def check_num_weights(weights: Sequence[object], *, num_experts: int) -> None:
    """Raises InputError unless there is one weight per expert."""
    if len(weights) != num_experts:
        raise InputError(f"{len(weights)} merge weights were given for {num_experts} experts; give one for each.")
