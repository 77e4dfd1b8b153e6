"""From a recipe's settings and a vector of weights to a merge method."""

import math
from collections.abc import Iterable, Sequence

from deme_core.errors import InputError
from deme_core.merge_methods import METHODS, Average, BlockWeights, TaskArithmetic, TensorMerge
from deme_core.merge_methods.block_weights import block_names, transformer_depth
from deme_core.recipe import MethodSpec


def num_weights(spec: MethodSpec, num_experts: int, names: Iterable[str]) -> int:
    """Returns how many weights a search has to find: one per expert, and for block_weights one per expert and block."""
    if spec.method == "average":
        return 0
    return num_experts * (len(block_names(names)) if spec.method == "block_weights" else 1)


def build_method(spec: MethodSpec, weights: Sequence[float], num_experts: int, names: Iterable[str]) -> TensorMerge:
    """Returns the merge method.

    Args:
        spec: which method.
        weights: one per expert; for block_weights alternatively one per expert and block, expert by expert, the
            blocks in alphabetical order; none for average.
        num_experts: N.
        names: the tensors of the model.

    Raises:
        InputError: there are too few or too many weights, or one is not finite.
    """
    names = list(names)
    if num_experts == 0:  # None passed the gate: the pretrained model stays as it is.
        return TaskArithmetic(())
    if spec.method == "average":
        return Average()
    allowed = {num_experts, num_weights(spec, num_experts, names)}
    if len(weights) not in allowed:
        raise InputError(f"{len(weights)} merge weights were given for {num_experts} experts; give one for each.")
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"Merge weights must be finite numbers, not {list(weights)}.")
    given = tuple(float(weight) for weight in weights)
    if spec.method == "block_weights":
        blocks = block_names(names)
        if len(given) == num_experts:
            given = tuple(weight for weight in given for _ in blocks)
        rows = tuple(given[i * len(blocks) : (i + 1) * len(blocks)] for i in range(num_experts))
        return BlockWeights(rows, blocks, transformer_depth(names))
    own = {name: value for name, value in spec.settings().items() if name != "method"}
    return METHODS[spec.method](given, **own)
