"""The teacher of a LoRA: the very model that is trained, its adapter switched off, which is theta_0."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from deme_core.families import Adapter, ConditioningTensors
from deme_core.lora.attach import is_lora
from deme_core.model_digest import tensors_digest


@dataclass(frozen=True, eq=False)
class LoraTeacher:
    """Theta_0 without a second copy of it; takes the place of `deme_core.teacher.Teacher`.

    Attributes:
        model: has an adapter, as `attach_lora` leaves it.
    """

    model: nn.Module

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """Models besides the one that is trained: none."""
        return ()

    def to(self, device: torch.device | str) -> "LoraTeacher":
        """Returns the teacher with its model on ``device``."""
        return LoraTeacher(self.model.to(device))

    def digests(self) -> list[str]:
        """Returns the digest of all that is frozen: equal before and after a training."""
        frozen = {name: tensor for name, tensor in self.model.state_dict().items() if not is_lora(name)}
        return [tensors_digest(frozen)]

    @torch.no_grad()
    def predict(
        self, adapter: Adapter, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: ConditioningTensors
    ) -> torch.Tensor:
        """Returns what theta_0 predicts; see `deme_core.teacher.Teacher.predict`."""
        with without_lora(self.model):
            return adapter.predict(self.model, noisy, adapter.noise_process.model_timesteps(timesteps), conditioning)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Makes ``model`` theta_0 in eval mode for a while."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    was_training = model.training
    model.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.train(was_training)
