"""From a denoiser to one with a LoRA adapter, by peft, and from its trained tensors to factors."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from deme_core.errors import InputError
from deme_core.lora.factors import LoraFactors
from deme_core.recipe import LoraSpec

_NAME = "default"  # Of the adapter, in peft's names of tensors.
_DOWN, _UP = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"


def attach_lora(model: nn.Module, spec: LoraSpec, *, seed: int) -> list[str]:
    """Gives ``model`` an adapter, which changes nothing yet, and freezes everything else.

    Args:
        model: the denoiser; it is changed.
        spec: rank, scale and layers.
        seed: of the random A; B is zero.

    Returns:
        The names of the layers.

    Raises:
        InputError: a target names no layer, or one that is neither linear nor a convolution.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = target_layers(model, spec.target_modules)
    torch.manual_seed(seed)
    config = LoraConfig(r=spec.rank, target_modules=layers)
    config.lora_alpha = spec.scale * spec.rank  # type: ignore[assignment]  # Declared an int, and divided by the rank.
    inject_adapter_in_model(config, model)
    return layers


def target_layers(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Returns the names of the layers whose names end with one of ``targets``; by default those of attention.

    Raises:
        InputError: a target names no layer, or one that is neither linear nor a convolution.
    """
    modules = dict(model.named_modules())
    found: dict[str, None] = {}
    for target in targets or _ATTENTION:
        layers = [name for name in modules if f".{name}".endswith(f".{target}")]
        if targets is not None and not layers:
            raise InputError(
                f"finetune.lora.target_modules: {target} is no layer of a {type(model).__name__}; it has, for "
                f"example, {', '.join(_examples(modules))}."
            )
        if wrong := [name for name in layers if not _takes_lora(modules[name])]:
            raise InputError(
                f"finetune.lora.target_modules: {wrong[0]} is of class {type(modules[wrong[0]]).__name__}; an adapter "
                "goes to linear layers and convolutions without groups."
            )
        found |= dict.fromkeys(layers)
    if not found:
        raise InputError(
            f"A {type(model).__name__} of this config has no attention; set finetune.lora.target_modules to some of "
            f"its layers, as {', '.join(_examples(modules))}."
        )
    return list(found)


# Of both streams in SD3 and Flux.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def _takes_lora(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1


def _examples(modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, module in modules.items() if _takes_lora(module)][:3]


def is_lora(name: str) -> bool:
    """Whether a tensor of a model with an adapter is the adapter's."""
    return ".lora_" in name


def trained_factors(tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> dict[str, LoraFactors]:
    """Returns the factors among the trained tensors of a model that has an adapter, by layer, scale included."""
    layers = sorted(name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN))
    return {
        layer: LoraFactors(tensors[f"{layer}{_DOWN}"].float(), tensors[f"{layer}{_UP}"].float() * spec.scale)
        for layer in layers
    }
