"""DARE: drop and rescale task vectors before task arithmetic (Yu et al. 2024, arXiv 2311.03099)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme_core.errors import InputError
from deme_core.merge_methods.task_arithmetic import check_num_weights, weighted_sum
from deme_core.seeds import generator


@dataclass(frozen=True)
class Dare:
    """One weight per expert, after a share of every task vector was dropped at random.

    Args:
        weights: w_i of each expert.
        drop_rate: probability p in [0, 1) that an entry of a task vector is dropped.
        seed: the mask of a tensor depends on this, the expert's index and the tensor's name, and on nothing else.

    Raises:
        InputError: ``drop_rate`` is out of range.
    """

    weights: tuple[float, ...]
    drop_rate: float
    seed: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.drop_rate < 1.0:
            raise InputError(f"drop_rate must be at least 0 and less than 1, not {self.drop_rate}.")

    def __call__(self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns theta_0 + sum_i w_i m_i tau_i / (1 - p), m_i ~ Bernoulli(1 - p) per entry; see ``TensorMerge``."""
        check_num_weights(self.weights, num_experts=len(finetuned))
        # theta_0 + (theta_i - theta_0) is not theta_i bit for bit, so nothing is computed that changes nothing.
        if self.drop_rate == 0.0 or not pretrained.is_floating_point():
            return weighted_sum(pretrained, finetuned, self.weights)
        thinned = [
            self._thin(index, name, pretrained, tensor) if weight else tensor
            for index, (weight, tensor) in enumerate(zip(self.weights, finetuned, strict=True))
        ]
        return weighted_sum(pretrained, thinned, self.weights)

    def _thin(self, index: int, name: str, pretrained: torch.Tensor, finetuned: torch.Tensor) -> torch.Tensor:
        # Always drawn on the CPU: a GPU's generator gives other numbers, and a merge must not depend on the device.
        draws = torch.rand(pretrained.shape, generator=generator("dare", self.seed, index, name))
        kept = (draws >= self.drop_rate).to(pretrained.device)
        task_vector = finetuned.float() - pretrained.float()
        return task_vector.div_(1.0 - self.drop_rate).mul_(kept).add_(pretrained.float())
