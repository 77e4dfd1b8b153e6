"""Gram matrices of the inputs of a denoiser's linear maps: which directions a copy sees on its own timesteps."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deme_core.families import Adapter
from deme_core.heldout_loss import draw_in_bin, encode_images
from deme_core.images import ImageDataset
from deme_core.seeds import generator
from deme_core.segments import TimestepSegment
from deme_core.tf32 import without_tf32

Grams = dict[str, torch.Tensor]
LinearMap = nn.Linear | nn.Conv2d


def linear_maps(model: nn.Module, *, max_features: int) -> dict[str, LinearMap]:
    """Returns the linear maps by name whose inputs have at most ``max_features`` features, a bias not counted.

    A convolution is the linear map from the patches it sees; one in groups is left out.
    """
    maps = {name: module for name, module in model.named_modules() if isinstance(module, LinearMap)}
    return {
        name: module
        for name, module in maps.items()
        if getattr(module, "groups", 1) == 1 and module.weight[0].numel() <= max_features
    }


def share_of(names: Iterable[str], model: nn.Module) -> float:
    """Returns which share of a model's parameters the linear maps of these names have."""
    maps = [model.get_submodule(name) for name in names]
    return sum(p.numel() for each in maps for p in each.parameters()) / sum(p.numel() for p in model.parameters())


def num_features(layer: LinearMap) -> int:
    """Returns D, the features of an input; the constant 1 that a bias multiplies is one of them."""
    return layer.weight[0].numel() + (layer.bias is not None)


@torch.inference_mode()
@without_tf32()
def input_grams(
    model: nn.Module,
    adapter: Adapter,
    images: ImageDataset,
    *,
    segment: TimestepSegment,
    num_images: int,
    max_features: int,
    seed: int = 0,
    batch_size: int = 64,
    positions_per_image: int = 64,
    device: torch.device | str = "cpu",
) -> Grams:
    """Returns E[x x^T] of the inputs x of each linear map, over noisy images of a segment.

    Args:
        model: the denoiser, in eval mode.
        adapter: says how it is noised and called.
        images: real images; the first ``num_images`` of a shuffled order, or all, are taken.
        segment: the timesteps, stratified over the images.
        num_images: how many images.
        max_features: maps from more features than that are left out: their matrices would be too large.
        seed: names images, timesteps and noise.
        batch_size: images per forward pass.
        positions_per_image: of a map that works at many positions, so many are drawn from each image.
        device: where the model is.

    Returns:
        float64 (D, D) by the name of the map, on the CPU; with a bias D is one more than its features.
    """
    order = torch.randperm(len(images), generator=generator("grams", seed)).tolist()[:num_images]
    process = adapter.noise_process
    with _recording(linear_maps(model, max_features=max_features), positions_per_image, seed) as sums:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = encode_images(adapter, images, indices)
            adapter.rest()
            clean, batch = batch.latents.cpu(), batch.to(device)
            draws = [
                draw_in_bin(seed, 0, start + i, len(order), segment.low, segment.high, clean.shape[1:])
                for i in range(len(indices))
            ]
            timesteps = torch.tensor([timestep for timestep, _ in draws])
            noisy = process.add_noise(clean, torch.stack([noise for _, noise in draws]), timesteps).to(device)
            told = process.model_timesteps(timesteps).to(device)
            adapter.predict(model, noisy, told, batch.conditioning)
    return {name: (total / count).cpu() for name, (total, count) in sums.items()}


@contextmanager
def _recording(
    layers: dict[str, LinearMap], positions_per_image: int, seed: int
) -> Iterator[dict[str, tuple[torch.Tensor, int]]]:
    """Sums x x^T over all inputs of ``layers`` while it is open; gives sums and counts by name."""
    sums: dict[str, tuple[torch.Tensor, int]] = {}
    rng = generator("positions", seed)

    def record(name: str, layer: LinearMap, inputs: Sequence[Any]) -> None:
        rows = _inputs_of(layer, inputs[0], positions_per_image, rng).float()
        # On a GPU float64 is slow and this sum of products is not what limits the precision.
        product = (rows.T @ rows).double()
        total, count = sums.get(name, (torch.zeros_like(product), 0))
        sums[name] = (total + product, count + len(rows))

    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: record(name, layer, inputs))
        for name, layer in layers.items()
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _inputs_of(layer: LinearMap, given: torch.Tensor, num_positions: int, rng: torch.Generator) -> torch.Tensor:
    """Returns the inputs (n, D) of a linear map among what it is given: patches of images, or rows of features."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        rows = F.unfold(given, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
    else:
        rows = given.reshape(len(given), -1, given.shape[-1])
    if rows.shape[1] > num_positions:
        chosen = torch.randperm(rows.shape[1], generator=rng)[:num_positions].to(rows.device)
        rows = rows[:, chosen]
    rows = rows.flatten(0, 1)
    return rows if layer.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
