"""What each image of a set is conditioned on, and classifier-free guidance (arXiv 2207.12598)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deme_core.errors import InputError
from deme_core.families import Adapter, ConditioningTensors
from deme_core.families.adapter import NO_LABEL
from deme_core.prompts import Prompts


@dataclass(frozen=True)
class Guidance:
    """The conditioning of one batch, and how far predictions are pushed towards it.

    Attributes:
        conditioning: what the images show.
        unconditional: what stands for nothing; None without guidance.
        scale: s in unconditional + s (conditional - unconditional); 1 is no guidance.
    """

    conditioning: ConditioningTensors
    unconditional: ConditioningTensors | None = None
    scale: float = 1.0

    def predict(self, adapter: Adapter, model: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the guided prediction for noisy latents (B, C, H, W), float32; see `Adapter.predict`."""
        if self.unconditional is None:
            return adapter.predict(model, noisy, timesteps, self.conditioning).float()
        both = {name: torch.cat([self.unconditional[name], tensor]) for name, tensor in self.conditioning.items()}
        predictions = adapter.predict(model, torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), both)
        unconditional, conditional = predictions.float().chunk(2)  # What guidance multiplies would be coarse in bf16.
        return unconditional + self.scale * (conditional - unconditional)


def image_guidance(
    adapter: Adapter, indices: Sequence[int], *, prompts: Prompts | None = None, scale: float = 1.0
) -> Guidance:
    """Returns what the images ``indices`` of a set are conditioned on.

    Image i belongs to prompt i, or to class i, modulo the number of them.

    Args:
        adapter: the model's.
        indices: which images.
        prompts: for a model that takes text.
        scale: guidance scale.

    Raises:
        InputError: the model is conditioned on text, and there are no prompts.
    """
    sizes = adapter.encode_sizes(len(indices))
    match adapter.conditioned_on:
        case "nothing":
            return Guidance({})
        case "captions":
            if prompts is None:
                raise InputError(
                    f"A {adapter.pipeline} makes images from text; name a file of prompts by evaluate.prompts, or by "
                    "--prompts on the command line."
                )
            conditioning = adapter.encode_prompts(prompts.of_images(indices))
        case "labels":
            conditioning = adapter.encode_labels([index % adapter.num_classes for index in indices])
    if scale == 1.0:
        return Guidance(conditioning | sizes)
    nothing = (
        adapter.encode_prompts([""]) if adapter.conditioned_on == "captions" else adapter.encode_labels([NO_LABEL])
    )
    repeated = {name: tensor.expand(len(indices), *tensor.shape[1:]) for name, tensor in nothing.items()}
    return Guidance(conditioning | sizes, repeated | sizes, scale)
