"""What the flow needs to know of a pretrained model."""

from pathlib import Path
from typing import Any

from deme_core.families import Adapter
from deme_core.merge_methods.block_weights import block_names
from deme_core.model_digest import tensors_digest
from deme_core.model_folder import open_model_folder


def describe_model(folder: Path) -> dict[str, Any]:
    """Returns what the flow needs to know of theta_0."""
    model = open_model_folder(folder)
    tensors = model.checkpoint().tensors()
    return {
        "caches": _caches(model.adapter()),
        "num_blocks": len(block_names(tensors)),
        "num_train_timesteps": model.num_train_timesteps,
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "weights_digest": tensors_digest(tensors),
    }


def _caches(adapter: Adapter) -> list[str]:
    """Returns the stages whose artifacts spare trainings the frozen parts; none for a model on pixels."""
    if "vae" not in adapter.frozen_parts:
        return []
    return ["latents", *(["embeddings"] if adapter.conditioned_on == "captions" else [])]
