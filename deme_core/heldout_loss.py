"""The denoising loss on images that no training saw, by timestep: cheap, and nearly free of noise.

Every model sees the same images, timesteps and noise, so that differences between models vary far less than their
losses do. A lower loss is no better picture: METHOD section 5.10 has a merge that wins every quarter and samples worse.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from deme_core.binned_losses import Losses
from deme_core.errors import NonFiniteImagesError
from deme_core.families import Adapter, EncodedBatch, encode_batch
from deme_core.images import ImageDataset, normalize
from deme_core.seeds import generator
from deme_core.tf32 import without_tf32


@torch.inference_mode()
@without_tf32()
def heldout_losses(
    model: nn.Module,
    adapter: Adapter,
    images: ImageDataset,
    *,
    edges: Sequence[int],
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Losses:
    """Returns the loss of every image in every bin.

    In each bin the timesteps are stratified over the images: image i of n draws from the i-th of n equal parts.

    Args:
        model: the denoiser, in eval mode.
        adapter: says how the model is noised and called, and what its target is.
        images: those held out, n of them.
        edges: B + 1 bin edges.
        seed: names timesteps and noise.
        batch_size: images per forward pass; changes the speed only.
        device: where the model is.

    Returns:
        Mean squared error per image and bin, float32 (n, B).
    """
    process = adapter.noise_process
    losses = np.empty((len(images), len(edges) - 1), dtype=np.float32)
    for start in range(0, len(images), batch_size):
        indices = range(start, min(start + batch_size, len(images)))
        batch = encode_images(adapter, images, indices)
        adapter.rest()
        clean, batch = batch.latents.cpu(), batch.to(device)
        for column, (low, high) in enumerate(itertools.pairwise(edges)):
            draws = [draw_in_bin(seed, column, index, len(images), low, high, clean.shape[1:]) for index in indices]
            timesteps = torch.tensor([timestep for timestep, _ in draws])
            noise = torch.stack([noise for _, noise in draws])
            target = process.target(clean, noise, timesteps)
            noisy = process.add_noise(clean, noise, timesteps).to(device)
            told = process.model_timesteps(timesteps).to(device)
            prediction = adapter.predict(model, noisy, told, batch.conditioning)
            errors = (prediction.float().cpu() - target).square().flatten(1).mean(dim=1)
            losses[start : start + len(indices), column] = errors.numpy()
    return losses


def check_finite(losses: Losses, what: str) -> None:
    """Raises NonFiniteImagesError, which names ``what`` was measured, if a loss is NaN or infinite."""
    if not np.isfinite(losses).all():
        raise NonFiniteImagesError(
            f"The held-out loss of {what} is NaN or infinite; train it with a lower learning rate, or merge with "
            "smaller weights."
        )


def encode_images(adapter: Adapter, images: ImageDataset, indices: Sequence[int]) -> EncodedBatch:
    """Returns the images ``indices``, with what they are conditioned on, as the denoiser knows them."""
    return encode_batch(
        adapter,
        normalize(torch.stack([images.image(index) for index in indices])),
        captions=images.captions and [images.captions[index] for index in indices],
        labels=images.labels and [images.labels[index] for index in indices],
    )


def draw_in_bin(
    seed: int, column: int, index: int, num_images: int, low: int, high: int, shape: Sequence[int]
) -> tuple[int, torch.Tensor]:
    """Returns timestep and noise of one image in the bin [low, high): the i-th of n draws from the i-th of n parts."""
    rng = generator("heldout", seed, column, index)
    position = (index + float(torch.rand((), generator=rng, dtype=torch.float64))) / num_images
    return min(low + int(position * (high - low)), high - 1), torch.randn(tuple(shape), generator=rng)
