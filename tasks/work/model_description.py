"""What the flow needs to know of a pretrained model."""

from pathlib import Path
from typing import Any

from deme_core.model_digest import tensors_digest
from deme_core.model_folder import open_model_folder


def describe_model(folder: Path) -> dict[str, Any]:
    """Returns what the flow needs to know of theta_0."""
    model = open_model_folder(folder)
    tensors = model.checkpoint().tensors()
    return {
        "num_train_timesteps": model.num_train_timesteps,
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "weights_digest": tensors_digest(tensors),
    }
