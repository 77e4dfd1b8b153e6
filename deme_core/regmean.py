"""RegMean: each linear map of the merge fits what every expert's map does to the inputs of its own timesteps.

Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv 2212.09849. With G_i the Gram
matrix of the inputs that expert i sees on its own segment, the least-squares fit to all experts at once is

    W = W_0 + sum_i (W_i - W_0) G_i (sum_j G_j)^-1

which is task arithmetic with confined task vectors tau_i G_i (sum_j G_j)^-1: each keeps what it does to inputs that are
typical of its own segment, and loses what it does to those of others, where it would interfere.
"""

from collections.abc import Mapping, Sequence

import torch

from deme_core.activation_grams import Grams
from deme_core.checkpoint import Checkpoint

# A layer some of whose inputs never vary has a singular matrix: theta_0 pulls with this share of the mean square input.
_RIDGE = 1e-3


def confine(
    pretrained: Mapping[str, torch.Tensor],
    expert: Mapping[str, torch.Tensor],
    index: int,
    grams: Sequence[Grams | Checkpoint],
    *,
    shrinkage: float,
) -> dict[str, torch.Tensor]:
    """Returns an expert whose task vector acts on the inputs of its own segment alone.

    The sum of the confined task vectors of all experts is RegMean's merge: merge weights of 1. What is not part of a
    linear map that was measured, as norms, becomes a plain average: tau_i / N.

    Args:
        pretrained: theta_0, stock tensors.
        expert: theta_i, stock tensors.
        index: i.
        grams: Gram matrices (D, D) by linear map, of each of the N experts; of files one map's are in memory at a time.
        shrinkage: share of the matrices' off-diagonal entries that is kept, in [0, 1].

    Returns:
        The tensors, in the dtypes of ``pretrained``.
    """
    moved = {
        name: _moved(tensor, _difference(expert, pretrained, name) / len(grams))
        for name, tensor in pretrained.items()
        if tensor.is_floating_point()
    }
    confined = {**pretrained, **moved}
    for layer in grams[index]:
        names = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in pretrained]
        columns = [_difference(expert, pretrained, name).reshape(len(pretrained[name]), -1) for name in names]
        kept = _kept(torch.cat(columns, dim=1), index, [_shrunk(gram[layer], shrinkage) for gram in grams])
        for name, part in zip(names, kept.split([column.shape[1] for column in columns], dim=1), strict=True):
            confined[name] = _moved(pretrained[name], part)
    return confined


def _kept(task_vector: torch.Tensor, index: int, grams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns tau_i G_i (sum_j G_j)^-1 of a map (C, D), float64."""
    total = torch.stack(list(grams)).sum(dim=0)
    total += _RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)
    return torch.linalg.solve(total, grams[index] @ task_vector.T).T


def _difference(expert: Mapping[str, torch.Tensor], pretrained: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return expert[name].double() - pretrained[name].double()


def _moved(tensor: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return (tensor.double() + by.reshape(tensor.shape)).to(tensor.dtype)


def _shrunk(gram: torch.Tensor, shrinkage: float) -> torch.Tensor:
    gram = gram.double()
    return shrinkage * gram + (1 - shrinkage) * torch.diag(gram.diagonal())
