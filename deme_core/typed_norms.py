"""Normalization in the type of its input, where autocast would turn every feature map to float32 and back.

On an H100 those conversions are most of what a convolutional denoiser waits for: they move bytes, and compute nothing.
Means and variances are float32 inside of torch's kernels whatever the type; what is rounded is the result.
"""

import torch
import torch.nn.functional as F
from torch import nn


def normalize_in_type(model: nn.Module) -> None:
    """Makes the group and layer norms of ``model`` keep the type of their input; parameters and names stay."""
    for module in model.modules():
        # Not subclasses: some ask for float32 on purpose.
        if (typed := _TYPED.get(type(module))) is not None:
            module.__class__ = typed


class _GroupNorm(nn.GroupNorm):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            weight, bias = _cast(self.weight, features), _cast(self.bias, features)
            return F.group_norm(features, self.num_groups, weight, bias, self.eps)


class _LayerNorm(nn.LayerNorm):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            weight, bias = _cast(self.weight, features), _cast(self.bias, features)
            return F.layer_norm(features, self.normalized_shape, weight, bias, self.eps)


_TYPED: dict[type[nn.Module], type[nn.Module]] = {nn.GroupNorm: _GroupNorm, nn.LayerNorm: _LayerNorm}


def _cast(parameter: torch.Tensor | None, features: torch.Tensor) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(features.dtype)
