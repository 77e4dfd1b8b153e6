"""A model whose merge weights can be changed in place: what a search evaluates."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from deme_core.checkpoint import Checkpoint
from deme_core.merge import check_experts, check_weights, merged_tensors
from deme_core.model_folder import tensor_infos


class LiveMerge:
    """Holds theta_0 and the experts in memory and rewrites ``model`` for each candidate; nothing touches the disk.

    Args:
        model: the pretrained model; it is changed by ``set_weights``.
        experts: tensors of the experts, lowest timesteps first.

    Raises:
        IncompatibleCheckpointsError: the experts do not match the model.
    """

    def __init__(self, model: nn.Module, experts: Sequence[Checkpoint | Mapping[str, torch.Tensor]]) -> None:
        self.model = model
        device = next(model.parameters()).device
        self._pretrained = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self._experts = [{name: expert[name].to(device) for name in expert} for expert in experts]
        check_experts(
            tensor_infos(self._pretrained),
            {f"expert {index}": tensor_infos(expert) for index, expert in enumerate(self._experts)},
        )

    @torch.no_grad()
    def set_weights(self, weights: Sequence[float]) -> None:
        """Makes ``model`` the merge under ``weights``, projections folded in."""
        check_weights(weights, num_experts=len(self._experts))
        state = self.model.state_dict()
        for name, tensor in merged_tensors(self._pretrained, self._experts, weights):
            state[name].copy_(tensor)
