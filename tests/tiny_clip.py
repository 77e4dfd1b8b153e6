"""A CLIP model and tokenizer as transformers saves them, random and small."""

import json
from pathlib import Path
from typing import Any

import torch

TINY_VISION: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32}


def write_tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """Writes what transformers saves of a tiny CLIPModel, and a tokenizer that knows single letters and 'cat'."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    first, last = len(words) - 2, len(words) - 1
    layers = {"intermediate_size": 32, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 24, "hidden_size": 16, "num_hidden_layers": 2}
    tokens = {"bos_token_id": first, "eos_token_id": last, "pad_token_id": last}
    config = CLIPConfig(
        text_config={**layers, **text, **tokens},
        vision_config={**layers, **TINY_VISION, "projection_dim": 8},
        projection_dim=8,
    )
    model = CLIPModel(config)
    model.load_state_dict(randomized(model.state_dict(), seed=seed))
    model.save_pretrained(folder)
    return folder


def randomized(tensors: dict[str, torch.Tensor], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Fresh networks start close to a constant: other values make every tensor count."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
