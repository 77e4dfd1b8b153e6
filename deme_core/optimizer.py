"""The optimizer of a training run: AdamW, with moments of 32 bits or of 8 (arXiv 2110.02861)."""

from collections.abc import Iterable

import torch
from torch import nn

from deme_core.errors import InputError
from deme_core.recipe import TrainingSpec


def build_optimizer(parameters: Iterable[nn.Parameter], spec: TrainingSpec) -> torch.optim.Optimizer:
    """Returns the optimizer that ``spec`` names, over ``parameters``.

    Raises:
        InputError: it needs a package that is not installed.
    """
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=spec.learning_rate, betas=spec.adam_betas, weight_decay=spec.weight_decay, fused=True
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            "finetune.optimizer adamw_8bit needs the package bitsandbytes, 0.50 or newer; install it beside DeMe, or "
            "set adamw."
        ) from error
    return AdamW8bit(parameters, lr=spec.learning_rate, betas=spec.adam_betas, weight_decay=spec.weight_decay)
