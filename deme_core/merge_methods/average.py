"""The plain mean of the experts: model soups (Wortsman et al. 2022, arXiv 2203.05482)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme_core.errors import InputError


@dataclass(frozen=True)
class Average:
    """Has no settings; up to rounding it is task arithmetic with all w_i = 1 / N."""

    def __call__(self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns (1 / N) sum_i theta_i; see ``TensorMerge``."""
        if not finetuned:
            raise InputError("No experts were given to average; give at least one.")
        if not pretrained.is_floating_point():
            return pretrained
        total = finetuned[0].to(torch.float32, copy=True)
        for tensor in finetuned[1:]:
            total.add_(tensor.float())
        return total.div_(len(finetuned))
