"""Real diffusers pipelines with every part of them, small enough to build, train and run within seconds.

All are on 16 x 16 images; an autoencoder of two levels makes 8 x 8 latents of them.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("a", "photo", "of", "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUM_TOKENS = 12


def tiny_tokenizer() -> CLIPTokenizer:
    """Returns a CLIPTokenizer that knows letters and ``WORDS``, merged letter by letter."""
    merges, vocabulary = [], [*map(chr, range(97, 123)), *(f"{chr(code)}</w>" for code in range(97, 123))]
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (merge := (parts[0], parts[1])) not in merges:
                merges.append(merge)
                vocabulary.append("".join(parts[:2]))
            parts[:2] = ["".join(parts[:2])]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=NUM_TOKENS)


def tiny_clip(seed: int, tokenizer: CLIPTokenizer, kind: Any = CLIPTextModel, **overrides: Any) -> Any:
    """Returns a CLIP text encoder of two layers."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": NUM_TOKENS,
        "projection_dim": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return kind(CLIPTextConfig(**{**config, **overrides})).eval()


def tiny_vae(seed: int = 0, **overrides: Any) -> AutoencoderKL:
    """Returns an AutoencoderKL between 16 x 16 images and 8 x 8 latents."""
    torch.manual_seed(seed)
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**config, **overrides}).eval()


def stable_diffusion() -> DiffusionPipeline:
    """Returns a StableDiffusionPipeline with the scheduler that the published ones have."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_clip(2, tokenizer),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES = {"StableDiffusionPipeline": stable_diffusion}


def save_pipeline(name: str, path: Path) -> Path:
    """Writes the pipeline ``name`` as stock diffusers does."""
    PIPELINES[name]().save_pretrained(path)
    return path
