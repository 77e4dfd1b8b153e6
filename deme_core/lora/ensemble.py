"""The ensemble of LoRA experts: one model that wears the adapter of the timestep's segment."""

from collections.abc import Sequence

import torch
from torch import nn

from deme_core.lora.expert import LoraExpert
from deme_core.segments import TimestepSegment, segment_index


class LoraEnsemble:
    """A `deme_core.generate.Denoiser` that holds theta_0 once; it predicts what whole copies do, bit for bit.

    Args:
        model: theta_0; it is changed.
        segments: of the experts, lowest timesteps first.
        experts: the adapters on theta_0, anywhere.
    """

    def __init__(self, model: nn.Module, segments: Sequence[TimestepSegment], experts: Sequence[LoraExpert]) -> None:
        self._model, self._segments = model, segments
        self._worn: int | None = None
        changed = {name for expert in experts for name in expert.factors}
        self._tensors = {name: tensor for name, tensor in model.state_dict().items() if name in changed}
        base = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._experts = [expert.on(base) for expert in experts]

    def model_at(self, timestep: int) -> nn.Module:
        """Returns the model as the expert of ``timestep``'s segment, until it is asked for another."""
        self._wear(segment_index(self._segments, timestep))
        return self._model

    @torch.no_grad()
    def _wear(self, index: int) -> None:
        if index == self._worn:
            return
        for name, tensor in self._tensors.items():
            tensor.copy_(self._experts[index][name])
        self._worn = index
