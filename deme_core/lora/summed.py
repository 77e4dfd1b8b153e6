"""Several adapters as one: their weighted sum exactly, of the summed rank, or the nearest one of a lower rank.

With one weight w_i per expert and tensor, sum_i w_i B_i A_i is an adapter of its own: B = [w_1 B_1 | w_2 B_2 …], and A
has the A_i below one another. By the theorem of Eckart and Young, a singular value decomposition cut off after the R
largest values is the matrix of rank R that is nearest in the Frobenius norm; its error is the norm of the rest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from deme_core.errors import InputError
from deme_core.lora.factors import LoraFactors
from deme_core.merge_methods import Average, BlockWeights, TaskArithmetic, TensorMerge


@dataclass(frozen=True, eq=False)
class TruncatedAdapter:
    """An adapter of a chosen rank and how far it is from what it stands for.

    Attributes:
        factors: by layer.
        errors: by layer, Frobenius norm of the difference over that of the whole; 0 where the whole is 0.
        error: the same over all layers together.
    """

    factors: dict[str, LoraFactors]
    errors: dict[str, float]
    error: float


def sum_adapters(experts: Sequence[Mapping[str, LoraFactors]], method: TensorMerge) -> dict[str, LoraFactors]:
    """Returns the merge by ``method`` as one adapter of the summed rank.

    Args:
        experts: factors by layer, of each expert the same layers.
        method: has one weight per expert and tensor.

    Raises:
        InputError: there are no experts, or the method is none that adds task vectors up.
    """
    if not experts:
        raise InputError("No expert takes part in this merge, so that there is no adapter; it is the pretrained model.")
    if not isinstance(method, TaskArithmetic | BlockWeights | Average):
        raise InputError("This merge is no weighted sum of the adapters; give a rank to approximate it by --rank.")
    return {layer: _sum([expert[layer] for expert in experts], layer, method) for layer in experts[0]}


def _sum(each: Sequence[LoraFactors], layer: str, method: TensorMerge) -> LoraFactors:
    # The weights, as the method itself has them: what it makes of unit vectors.
    weights = method(f"{layer}.weight", torch.zeros(len(each)), list(torch.eye(len(each)))).tolist()
    up = torch.cat([weight * factors.up.float() for weight, factors in zip(weights, each, strict=True)], dim=1)
    return LoraFactors(torch.cat([factors.down.float() for factors in each]), up)


def truncate(factors: Mapping[str, LoraFactors], rank: int) -> TruncatedAdapter:
    """Returns the nearest adapter of rank ``rank``, by a singular value decomposition of each product, float64.

    The products themselves, which may be large, are never formed: B A = Q_B (R_B R_A^T) Q_A^T.
    """

    def decompose(each: LoraFactors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left, right = torch.linalg.qr(each.up.flatten(1).double()), torch.linalg.qr(each.down.flatten(1).double().T)
        u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
        return left.Q @ u, s, vh @ right.Q.T

    shapes = {layer: each.down.shape[1:] for layer, each in factors.items()}
    return _truncated(((layer, decompose(each)) for layer, each in factors.items()), shapes, rank)


def truncate_difference(differences: Iterable[tuple[str, torch.Tensor]], rank: int) -> TruncatedAdapter:
    """Returns the adapter of rank ``rank`` that is nearest to ``differences`` from theta_0, by layer, one at a time."""
    shapes: dict[str, torch.Size] = {}

    def decompose(layer: str, difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shapes[layer] = difference.shape[1:]
        u, s, vh = torch.linalg.svd(difference.flatten(1).double(), full_matrices=False)
        return u, s, vh

    return _truncated(((layer, decompose(layer, difference)) for layer, difference in differences), shapes, rank)


def _truncated(
    decomposed: Iterable[tuple[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]],
    shapes: Mapping[str, torch.Size],
    rank: int,
) -> TruncatedAdapter:
    factors, lost, total = {}, dict[str, float](), dict[str, float]()
    for layer, (u, s, vh) in decomposed:
        factors[layer] = _cut(u, s, vh, rank, shapes[layer])
        lost[layer], total[layer] = float(s[rank:].square().sum()), float(s.square().sum())
    return TruncatedAdapter(
        factors,
        errors={layer: _relative(lost[layer], total[layer]) for layer in factors},
        error=_relative(sum(lost.values()), sum(total.values())),
    )


def _cut(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int, shape: torch.Size) -> LoraFactors:
    """Returns the first ``rank`` terms, each factor with its share of the singular values.

    Layers of fewer dimensions get zeros, since older versions of diffusers scale layers of other ranks wrongly.
    """
    root = s[:rank].sqrt()
    missing = rank - len(root)
    up = torch.nn.functional.pad(u[:, :rank] * root, (0, missing)).float()
    down = torch.nn.functional.pad(root[:, None] * vh[:rank], (0, 0, 0, missing)).float()
    return LoraFactors(down.reshape(rank, *shape), up.reshape(len(up), rank, *[1] * (len(shape) - 1)))


def _relative(lost: float, total: float) -> float:
    return (lost / total) ** 0.5 if total else 0.0
