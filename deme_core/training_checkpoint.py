"""Training checkpoints: the whole state of a `Training` as safetensors and JSON, never pickled."""

import json
from pathlib import Path
from typing import Any

import torch

from deme_core.checkpoint import Checkpoint, save_tensors
from deme_core.training import Training

_STATE_NAME, _TENSORS_NAME = "state.json", "tensors.safetensors"


def save_checkpoint(training: Training, folder: Path) -> None:
    """Writes what is trained, EMA, optimizer, learning-rate schedule, gradient scaler and step into ``folder``."""
    tensors = {f"model.{name}": tensor for name, tensor in training.tensors().items()}
    names = list(training.trained)
    for name, shadow in zip(names, training.ema.shadow_params, strict=True):
        tensors[f"ema.{name}"] = shadow
    for index, moments in training.optimizer.state_dict()["state"].items():
        for moment, value in _flat(moments).items():
            tensors[f"optimizer.{moment}.{names[index]}"] = torch.as_tensor(value)
    tensors["timestep_counts"] = training.timestep_counts
    scaler = training.accelerator.scaler
    state: dict[str, Any] = {
        "global_step": training.global_step,
        "ema_step": training.ema.optimization_step,
        "lr_scheduler": training.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / _TENSORS_NAME, tensors)
    (folder / _STATE_NAME).write_text(json.dumps(state))


def restore_checkpoint(training: Training, folder: Path) -> None:
    """Puts ``training``, built with the same settings, into the state that ``save_checkpoint`` wrote."""
    state = json.loads((folder / _STATE_NAME).read_text())
    checkpoint = Checkpoint(folder / _TENSORS_NAME)
    for name, tensor in training.tensors().items():
        tensor.copy_(checkpoint[f"model.{name}"])
    names = list(training.trained)
    for name, shadow in zip(names, training.ema.shadow_params, strict=True):
        shadow.copy_(checkpoint[f"ema.{name}"])
    training.ema.optimization_step = state["ema_step"]
    optimizer_state = training.optimizer.state_dict()
    moments = sorted({key.split(".")[1] for key in checkpoint if key.startswith("optimizer.")})
    optimizer_state["state"] = {
        index: {
            moment: _restored(checkpoint[key], training.trained[name])
            for moment in moments
            if (key := f"optimizer.{moment}.{name}") in checkpoint
        }
        for index, name in enumerate(names)
    }
    training.optimizer.load_state_dict(optimizer_state)
    training.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for group, rate in zip(training.optimizer.param_groups, training.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    if state["scaler"] is not None and training.accelerator.scaler is not None:
        training.accelerator.scaler.load_state_dict(state["scaler"])
    training.timestep_counts.copy_(checkpoint["timestep_counts"])
    training.global_step = state["global_step"]


def _flat(moments: dict[str, Any]) -> dict[str, Any]:
    """Returns the moments of one parameter; bitsandbytes wraps some in a dict of their own, and reads either."""
    flat: dict[str, Any] = {}
    for name, value in moments.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _restored(moment: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor | int:
    """Returns a moment as its optimizer holds it.

    torch counts steps in a float32 tensor, bitsandbytes in an int. What has the shape of its parameter lies in memory
    as the parameter does (channels last, perhaps): a fused optimizer takes both number by number.
    """
    if moment.dtype == torch.int64:
        return int(moment)
    if moment.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=moment.dtype, device="cpu", requires_grad=False).copy_(moment)
    return moment.clone()
