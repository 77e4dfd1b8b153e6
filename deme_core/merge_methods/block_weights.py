"""Task arithmetic with one weight per expert and block of the network.

By layer these are the weights of AdaMerging (Yang et al., ICLR 2024, arXiv 2310.02575), which finds them by entropy.

The blocks of a diffusers UNet are its resolutions: ``level k`` is down block k and the up block of the same
resolution, ``mid`` the mid block. Those of a transformer are quarters of its depth, ``depth 0`` to ``depth 3``; FLUX's
single blocks come after its others. ``rest`` lies outside of both: in- and output layers, embeddings, final norms.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from deme_core.errors import InputError
from deme_core.merge_methods.task_arithmetic import check_num_weights, weighted_sum

_DOWN = re.compile(r"down_blocks\.(\d+)\.")
_UP = re.compile(r"up_blocks\.(\d+)\.")
# Anchored at the start of a name by match(): transformer blocks inside of a UNet belong to their level.
_TRANSFORMER = re.compile(r"(?:transformer_blocks|transformer_layers|blocks|layers)\.(\d+)\.")
_SINGLE = re.compile(r"single_transformer_blocks\.(\d+)\.")


def block_of(name: str, *, num_levels: int, depth: tuple[int, int] = (0, 0)) -> str:
    """Returns the block that a tensor belongs to.

    Args:
        name: the tensor's name in the state dict.
        num_levels: L, the number of down blocks. Up block j is of level L - 1 - j.
        depth: the numbers of transformer blocks, and of single ones after them. Block k of D is of quarter
            floor(4 k / D).
    """
    if match := _DOWN.match(name):
        return f"level {int(match[1])}"
    if match := _UP.match(name):
        return f"level {num_levels - 1 - int(match[1])}"
    if match := _TRANSFORMER.match(name):
        return f"depth {4 * int(match[1]) // sum(depth)}"
    if match := _SINGLE.match(name):
        return f"depth {4 * (depth[0] + int(match[1])) // sum(depth)}"
    return "mid" if name.startswith("mid_block.") else "rest"


def num_levels(names: Iterable[str]) -> int:
    """Returns the number of down blocks among the names of a model's tensors."""
    return _count(_DOWN, names)


def transformer_depth(names: Iterable[str]) -> tuple[int, int]:
    """Returns the numbers of transformer blocks and single ones among the names of a model's tensors."""
    names = list(names)
    return _count(_TRANSFORMER, names), _count(_SINGLE, names)


def block_names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the blocks that the tensors called ``names`` belong to, sorted."""
    levels, depth = num_levels(names := list(names)), transformer_depth(names)
    return tuple(sorted({block_of(name, num_levels=levels, depth=depth) for name in names}))


def _count(pattern: re.Pattern[str], names: Iterable[str]) -> int:
    return max((int(match[1]) + 1 for name in names if (match := pattern.match(name))), default=0)


@dataclass(frozen=True)
class BlockWeights:
    """One weight per expert and block.

    Args:
        weights: ``weights[i][b]`` is the weight of expert i in block ``blocks[b]``.
        blocks: what ``block_names`` returns for the model.
        depth: `transformer_depth`, for a transformer; a UNet's levels are counted from ``blocks``.

    Raises:
        InputError: an expert does not have one weight per block, or depth and blocks do not fit together.
    """

    weights: tuple[tuple[float, ...], ...]
    blocks: tuple[str, ...]
    depth: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for row in self.weights:
            if len(row) != len(self.blocks):
                raise InputError(f"{len(row)} merge weights were given for {len(self.blocks)} blocks; give as many.")
        if not any(self.depth) and any(block.startswith("depth ") for block in self.blocks):
            raise InputError("The blocks are those of a transformer, so give the numbers of its transformer blocks.")

    def __call__(self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns theta_0 + sum_i w_i,b tau_i, b being the block of ``name``; see ``TensorMerge``."""
        check_num_weights(self.weights, num_experts=len(finetuned))
        levels = sum(block.startswith("level ") for block in self.blocks)
        block = block_of(name, num_levels=levels, depth=self.depth)
        if block not in self.blocks:
            raise InputError(f"{name} is of block {block}, which has no merge weights; the blocks are {self.blocks}.")
        column = self.blocks.index(block)
        return weighted_sum(pretrained, finetuned, [row[column] for row in self.weights])
