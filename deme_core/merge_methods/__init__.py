"""Ways to merge finetuned copies into one model, one tensor at a time: one file per method, with its paper.

A method is a frozen dataclass of its settings and is called once per tensor, a channel projection being a tensor of
its own whose pretrained value is the identity. Methods are pure: what they return may share memory with an input,
as a zero weight gives the pretrained tensor itself, so callers copy before they write.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from deme_core.merge_methods.average import Average
from deme_core.merge_methods.block_weights import BlockWeights
from deme_core.merge_methods.dare import Dare
from deme_core.merge_methods.task_arithmetic import TaskArithmetic
from deme_core.merge_methods.ties import Ties

__all__ = ["METHODS", "Average", "BlockWeights", "Dare", "TaskArithmetic", "TensorMerge", "Ties"]


class TensorMerge(Protocol):
    """What every method does."""

    def __call__(self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor]) -> torch.Tensor:
        """Merges one tensor; inputs are not changed.

        Args:
            name: the tensor's name in the state dict.
            pretrained: theta_0, of any shape and dtype.
            finetuned: theta_i of each expert, lowest timesteps first, in the shape of ``pretrained``.

        Returns:
            The merged tensor, float32; ``pretrained`` as it came where it is not floating point.

        Raises:
            InputError: the settings do not fit the number of experts or the tensor.
        """


METHODS: dict[str, Callable[..., TensorMerge]] = {
    "task_arithmetic": TaskArithmetic,
    "block_weights": BlockWeights,
    "ties": Ties,
    "dare": Dare,
    "average": Average,
}
