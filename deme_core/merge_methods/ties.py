"""TIES-Merging: trim task vectors, elect signs, merge what agrees (Yadav et al. 2023, arXiv 2306.01708)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme_core.errors import InputError
from deme_core.merge_methods.task_arithmetic import check_num_weights


@dataclass(frozen=True)
class Ties:
    """One weight per expert, over trimmed task vectors, without the experts that disagree with the elected sign.

    With t_i = trim(tau_i), and for every entry the elected sign s = sgn(sum_i w_i t_i) and A = {i : s w_i t_i > 0},

        merged = theta_0 + mean_i |w_i| * (sum_{i in A} w_i t_i) / (sum_{i in A} |w_i|);

    theta_0 where A is empty. All w_i = lambda > 0 give the paper's lambda * disjoint mean. At density 1, entries on
    which all experts agree are those of task arithmetic with weights w_i / N. An expert whose weight goes to zero
    fades out without a jump, as long as it turns no election, which a count |A| instead of the weights would not give.

    Args:
        weights: w_i of each expert.
        density: share of each tensor of a task vector, in (0, 1], that trimming keeps. The paper trims the task vector
            as a whole, which a merge that streams tensor by tensor cannot.

    Raises:
        InputError: ``density`` is out of range.
    """

    weights: tuple[float, ...]
    density: float

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise InputError(f"density must be greater than 0 and at most 1, not {self.density}.")

    def __call__(self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the merge that the class describes; see ``TensorMerge``."""
        check_num_weights(self.weights, num_experts=len(finetuned))
        if not pretrained.is_floating_point():
            return pretrained
        start, sizes = pretrained.float(), [abs(weight) for weight in self.weights if weight]
        if not sizes:
            return start
        pairs = [(w, tensor) for w, tensor in zip(self.weights, finetuned, strict=True) if w]
        vectors = [trim(tensor.float() - start, self.density).mul_(weight) for weight, tensor in pairs]
        elected = torch.stack(vectors).sum(0).sign_()
        total, agreeing = torch.zeros_like(start), torch.zeros_like(start)
        for size, vector in zip(sizes, vectors, strict=True):
            agrees = vector * elected > 0
            total.add_(vector.mul_(agrees))
            agreeing.add_(agrees, alpha=size)
        agreeing[agreeing == 0] = 1.0  # The total is zero there.
        return total.div_(agreeing).mul_(sum(sizes) / len(self.weights)).add_(start)


def trim(task_vector: torch.Tensor, density: float) -> torch.Tensor:
    """Returns a copy that keeps the k = round(density * numel) entries of largest magnitude; the others are zero.

    Of entries of equal magnitude the first in memory order are kept, so that k is exact and the choice always the same.
    """
    magnitudes = task_vector.abs().flatten()
    num_kept = round(density * magnitudes.numel())
    if num_kept == 0:
        return torch.zeros_like(task_vector)
    # Selecting is some six times faster than sorting, and a search merges every tensor for every candidate.
    threshold = magnitudes.kthvalue(magnitudes.numel() - num_kept + 1).values
    kept = magnitudes > threshold
    ties = magnitudes == threshold
    kept |= ties & (ties.cumsum(0) <= num_kept - kept.sum())
    return task_vector * kept.view_as(task_vector)
