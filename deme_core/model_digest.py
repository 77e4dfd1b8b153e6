"""The digest of a model's weights: its identity, whatever its files are called."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the sha256 over names, dtypes, shapes and bytes of ``tensors``, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Returns `tensors_digest` of the model's parameters and buffers."""
    return tensors_digest(model.state_dict())
