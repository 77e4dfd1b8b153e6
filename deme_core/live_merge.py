"""A model whose merge weights can be changed in place: what a search evaluates."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from deme_core.checkpoint import tensor_infos
from deme_core.lora.expert import LoraExpert
from deme_core.merge import Expert, changes, check_experts, merged_tensors, one_thread
from deme_core.merge_methods import TensorMerge


class LiveMerge:
    """Holds theta_0 and the experts in memory and rewrites ``model`` for each candidate; nothing touches the disk.

    Of LoRA experts it holds the factors alone, and of theta_0 what they change, beside the model.

    Args:
        model: the pretrained model; it is changed by ``apply``.
        experts: tensors of the experts, lowest timesteps first.

    Raises:
        IncompatibleCheckpointsError: the experts do not match the model.
    """

    def __init__(self, model: nn.Module, experts: Sequence[Expert]) -> None:
        self.model = model
        device = next(model.parameters()).device
        self._pretrained = {
            name: tensor.detach().clone() if any(changes(expert, name) for expert in experts) else tensor.detach()
            for name, tensor in model.state_dict().items()
        }
        self._experts = [_held(expert, self._pretrained, device) for expert in experts]
        check_experts(
            tensor_infos(self._pretrained),
            {
                f"expert {index}": expert.infos if isinstance(expert, LoraExpert) else tensor_infos(expert)
                for index, expert in enumerate(self._experts)
            },
        )

    @property
    def names(self) -> list[str]:
        """Names of the model's tensors."""
        return list(self._pretrained)

    @torch.no_grad()
    def apply(self, method: TensorMerge) -> None:
        """Makes ``model`` the merge by ``method``, projections folded in."""
        state = self.model.state_dict()
        # Once around all tensors, copies included: torch's threads woken and dismissed per tensor take several times as
        # long as the arithmetic, which torch's operations on whole lists of tensors would not shorten.
        with one_thread():
            for name, tensor in merged_tensors(self._pretrained, self._experts, method):
                if tensor.data_ptr() != state[name].data_ptr():  # What no expert changes is the model's own.
                    state[name].copy_(tensor)


def _held(
    expert: Expert, pretrained: Mapping[str, torch.Tensor], device: torch.device
) -> LoraExpert | dict[str, torch.Tensor]:
    """Returns an expert as it is kept on ``device``."""
    if isinstance(expert, LoraExpert):
        return expert.on(pretrained)
    return {name: expert[name].to(device) for name in expert}
