"""Channel-wise projection: a learnable C x C matrix P after a layer, folded into it exactly after merging.

P (W x + b) = (P W) x + P b, so a projection that directly follows a linear or convolution layer leaves no
trace in the architecture (METHOD section 1, "The projection must fold away").
"""

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

PARAMETER_NAME = "channel_projection"

# The layer that ends a residual branch or changes resolution, by the diffusers class that owns it.
_PROJECTED_LAYERS: Mapping[str, tuple[str, ...]] = {
    "ResnetBlock2D": ("conv2",),
    "ResnetBlockCondNorm2D": ("conv2",),
    "Downsample2D": ("conv",),
    "Upsample2D": ("conv", "Conv2d_0"),
    "Attention": ("to_out.0", "to_add_out"),
    "FluxAttention": ("to_out.0", "to_add_out"),
    "FluxSingleTransformerBlock": ("proj_out",),
    "FeedForward": ("net.2",),
    "Transformer2DModel": ("proj_out",),
}


def attach_projections(model: nn.Module) -> list[str]:
    """Gives every projected layer of ``model`` a trainable ``channel_projection``, initialised to the identity.

    The parameter lives on the layer itself, so that the names of all stock parameters stay as they are.

    Returns:
        The names of the layers that now have a projection.

    Raises:
        ValueError: the model has no layer to project, or already has projections.
    """
    layers = dict(_projected_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that a channel projection could follow")
    for name, layer in layers.items():
        if hasattr(layer, PARAMETER_NAME):
            raise ValueError(f"{name} already has a channel projection")
        identity = torch.eye(layer.weight.shape[0], dtype=layer.weight.dtype, device=layer.weight.device)
        layer.register_parameter(PARAMETER_NAME, nn.Parameter(identity))
        layer.__class__ = _ProjectedLinear if isinstance(layer, nn.Linear) else _ProjectedConv2d
    return list(layers)


def _projected_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for owner_name, owner in model.named_modules():
        for path in _PROJECTED_LAYERS.get(type(owner).__name__, ()):
            layer = _find(owner, path)
            if isinstance(layer, nn.Linear | nn.Conv2d):
                yield f"{owner_name}.{path}", layer


def _find(owner: nn.Module, path: str) -> nn.Module | None:
    try:
        return owner.get_submodule(path)
    except AttributeError:
        return None  # This variant of the block has no such layer, e.g. a Downsample2D that only pools.


class _ProjectedLinear(nn.Linear):
    """x -> P (W x + b), or (P W) x + P b where that costs less: where there are more outputs than inputs of each."""

    channel_projection: nn.Parameter

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        projection = self.channel_projection
        if input[..., 0].numel() > self.in_features:
            return F.linear(input, projection @ self.weight, None if self.bias is None else projection @ self.bias)
        return F.linear(super().forward(input), projection)


class _ProjectedConv2d(nn.Conv2d):
    """As `_ProjectedLinear`; here an output is a pixel, and its inputs are those under the kernel."""

    channel_projection: nn.Parameter

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        projection = self.channel_projection
        num_outputs = input[:, 0].numel() // math.prod(self.stride)
        if num_outputs > self.weight[0].numel():
            weight = (projection @ self.weight.flatten(1)).view_as(self.weight)
            return self._conv_forward(input, weight, None if self.bias is None else projection @ self.bias)
        return F.conv2d(super().forward(input), projection[:, :, None, None])


def projection_key(key: str) -> str:
    """Returns the name of the projection that acts on the weight or bias called ``key``."""
    return f"{key.rpartition('.')[0]}.{PARAMETER_NAME}"


def is_projection(key: str) -> bool:
    """Whether ``key`` names a projection and not a stock parameter."""
    return key.rpartition(".")[2] == PARAMETER_NAME


def fold_into(tensor: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Returns P W for a weight (C_out, …), or P b for a bias (C_out,), float32.

    An identity is recognised, so that folding an untouched projection keeps every bit.
    """
    tensor, projection = tensor.float(), projection.float()
    if torch.equal(projection, torch.eye(len(projection), dtype=projection.dtype, device=projection.device)):
        return tensor
    return (projection @ tensor.flatten(1)).view_as(tensor) if tensor.dim() > 1 else projection @ tensor


def fold_projections(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns ``tensors`` without projections, each folded into its layer, in the layers' own dtypes."""
    folded = {}
    for key, tensor in tensors.items():
        if is_projection(key):
            continue
        projection = tensors.get(projection_key(key))
        folded[key] = tensor if projection is None else fold_into(tensor, projection).to(tensor.dtype)
    return folded
