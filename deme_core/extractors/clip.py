"""CLIP ViT-B/32 (Radford et al. 2021, arXiv 2103.00020): its image embeddings, and the CLIP score of prompts.

Weights are a folder as transformers saves a CLIPModel. It is loaded without `from_pretrained`, which starts
missing tensors at random, prints, and asks the hub.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn.functional import interpolate

from deme_core.digests import json_digest, sha256_file
from deme_core.errors import InputError
from deme_core.extractor_names import FIXED_SIDES
from deme_core.extractors.base import (
    FeatureArray,
    NetworkExtractor,
    chunk_size,
    digest,
    fetched,
    fixed_resolution,
    per_channel,
    read_safetensors,
    standardize,
    unavailable,
)
from deme_core.extractors.hub import hub_folder
from deme_core.local_files import user_path

NAME: Final = "clip_vit_b_32"
_HUB_ID = "openai/clip-vit-base-patch32"
# As far as we know its main branch has pickles alone, and this one the same weights as safetensors.
_HUB_REVISIONS = ("main", "refs/pr/15")
_RESOLUTION = FIXED_SIDES[NAME]
# What makes a CLIP model ViT-B/32.
_VISION_SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32, "image_size": _RESOLUTION}
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_TOKENIZER = ("vocab.json", "merges.txt")
_MEND = (
    "set evaluate.extractor_weights to the path or object-store URI of a folder with config.json and "
    f"model.safetensors, as transformers saves {_HUB_ID}"
)
_SCORE_MEND = (
    "set evaluate.clip_weights to the path or object-store URI of a folder with config.json, model.safetensors, "
    f"vocab.json and merges.txt, as transformers saves {_HUB_ID}"
)
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PREPROCESSING = f"central square, bicubic as PIL; mean {_MEAN}, std {_STD}"
_PROMPTS_PER_CHUNK = 64


class _ImageTower(torch.nn.Module):
    """Images (B, 3, S, S) to their embeddings (B, D), not normalised."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.visual_projection(self.vision_model(pixel_values=images).pooler_output)
        return embeddings


@dataclass(frozen=True, eq=False)
class ClipScore:
    """How well each image fits its prompt (Hessel et al. 2021, arXiv 2104.08718), times 100 as torchmetrics has it.

    Attributes:
        digest: SHA-256 over weights, tokenizer and preprocessing.
        embed_images: embeddings (B, D) of uint8 images (B, C, H, W).
        embed_prompts: embeddings (B, D) of prompts; what exceeds the model's context is cut off.
    """

    digest: str
    embed_images: Callable[[torch.Tensor], FeatureArray]
    embed_prompts: Callable[[Sequence[str]], FeatureArray]

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> FeatureArray:
        """100 · max(cos(image, prompt), 0) of each pair, (B,), of uint8 images (B, 3, H, W)."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images cannot be scored against {len(prompts)} prompts.")
        different = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        texts = _unit_rows(self.embed_prompts(list(different)))[[different[prompt] for prompt in prompts]]
        pairs = _unit_rows(self.embed_images(images)) * texts
        return 100 * pairs.sum(axis=1).clip(min=0)


def load_clip(weights: str | None, resolution: int | None, folder: Path, device: torch.device) -> NetworkExtractor:
    """Load CLIP's image embeddings (512) from a folder of transformers, or from the hub."""
    return load_image_tower(weights, resolution, folder, device, vision_sizes=_VISION_SIZES)


def load_image_tower(
    weights: str | None, resolution: int | None, folder: Path, device: torch.device, *, vision_sizes: dict[str, int]
) -> NetworkExtractor:
    """The same for a CLIP model whose image tower has other sizes; tests load a tiny one.

    ViT-B/32 itself has been run by hand with random weights only: the trained ones could not be had here.
    """
    resolution = fixed_resolution(NAME, resolution, vision_sizes["image_size"])
    source = _source_folder(weights, folder, (_CONFIG, _WEIGHTS), _MEND)
    model = _model(source, device, _MEND)
    if any(getattr(model.config.vision_config, name) != size for name, size in vision_sizes.items()):
        raise unavailable(f"{source} holds a CLIP model, but not ViT-B/32", _MEND)
    return _extractor(model, source, device)


def clip_digest(weights: str | None, resolution: int | None, folder: Path) -> str:
    """Returns the digest of what `load_clip` would load, without the time and memory that it takes."""
    resolution = fixed_resolution(NAME, resolution, _RESOLUTION)
    return _image_digest(_source_folder(weights, folder, (_CONFIG, _WEIGHTS), _MEND), resolution)


def load_clip_score(*, weights: str | None = None, cache: Path, device: torch.device | str) -> ClipScore:
    """Load the CLIP score of any of OpenAI's CLIP models.

    Args:
        weights: path or object-store URI of a folder as transformers saves a CLIPModel and its CLIPTokenizer;
            default openai/clip-vit-base-patch32 from the hub.
        cache: what a URI names is fetched into this folder, once for each version of it.
        device: where the networks run.

    Returns:
        The score, its weights loaded; weights that cannot be had are an ExtractorUnavailableError.
    """
    device = torch.device(device)
    source = _source_folder(weights, cache / "extractors", (_CONFIG, _WEIGHTS, *_TOKENIZER), _SCORE_MEND)
    model, tokenizer = _model(source, device, _SCORE_MEND), _tokenizer(source)
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise unavailable(f"The tokenizer in {source} has more words than the model", _SCORE_MEND)
    return ClipScore(
        digest=_score_digest(source, model.config),
        embed_images=_extractor(model, source, device),
        embed_prompts=partial(_embed_prompts, model=model, tokenizer=tokenizer),
    )


def clip_score_digest(*, weights: str | None = None, cache: Path) -> str:
    """Returns the digest of what `load_clip_score` would load, without the time and memory that it takes."""
    from transformers import CLIPConfig

    source = _source_folder(weights, cache / "extractors", (_CONFIG, _WEIGHTS, *_TOKENIZER), _SCORE_MEND)
    try:
        config = CLIPConfig.from_json_file(source / _CONFIG)
    except Exception as error:  # as below
        raise unavailable(f"{source} holds no whole CLIPModel", _SCORE_MEND) from error
    return _score_digest(source, config)


def _score_digest(source: Path, config: Any) -> str:
    parts = [
        _image_digest(source, config.vision_config.image_size),
        *(sha256_file(source / name) for name in _TOKENIZER),
    ]
    return json_digest(parts)


def _image_digest(source: Path, resolution: int) -> str:
    settings = {"config": sha256_file(source / _CONFIG), "resolution": resolution, "preprocessing": _PREPROCESSING}
    return digest(NAME, source / _WEIGHTS, **settings)


def _extractor(model: Any, source: Path, device: torch.device) -> NetworkExtractor:
    resolution = model.config.vision_config.image_size
    return NetworkExtractor(
        name=NAME,
        digest=_image_digest(source, resolution),
        num_features=model.config.projection_dim,
        chunk_size=chunk_size(resolution, device),
        prepare=partial(
            _prepare, resolution=resolution, mean=per_channel(_MEAN, device), std=per_channel(_STD, device)
        ),
        network=_ImageTower(model),
    )


def _prepare(images: torch.Tensor, *, resolution: int, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """CLIP's preprocessing: the central square, resized as PIL does it.

    PIL rounds and clips after each of its two directions, as torch does for uint8 on a CPU alone: at sharp edges some
    levels of 256 away from what floats give.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side].cpu()
    resized = interpolate(square, size=(resolution, resolution), mode="bicubic", antialias=True)
    return standardize(resized.to(mean.device).float(), mean=mean, std=std)


def _model(source: Path, device: torch.device, mend: str) -> Any:
    """A CLIPModel in float32 with every tensor from the folder."""
    from transformers import CLIPConfig, CLIPModel

    try:
        model = CLIPModel(CLIPConfig.from_json_file(source / _CONFIG))
        # Old folders hold the positions' numbers, which are no weights.
        tensors = read_safetensors(source / _WEIGHTS, mend)
        model.load_state_dict({name: value for name, value in tensors.items() if not name.endswith("position_ids")})
    except InputError:
        raise
    except Exception as error:  # a config of another kind fails in as many ways as there are fields
        raise unavailable(f"{source} holds no whole CLIPModel", mend) from error
    return model.eval().to(device)


def _tokenizer(source: Path) -> Any:
    """A CLIPTokenizer of the two files that the digest covers, whatever else lies beside them."""
    from transformers import CLIPTokenizer

    vocab, merges = (str(source / name) for name in _TOKENIZER)
    try:
        return CLIPTokenizer(vocab=vocab, merges=merges)
    except Exception as error:  # the tokenizers package raises Exception itself
        raise unavailable(f"{source} holds no CLIP tokenizer", _SCORE_MEND) from error


@torch.inference_mode()
def _embed_prompts(prompts: Sequence[str], *, model: Any, tokenizer: Any) -> FeatureArray:
    chunks = [prompts[start : start + _PROMPTS_PER_CHUNK] for start in range(0, len(prompts), _PROMPTS_PER_CHUNK)]
    return np.concatenate([_embed_chunk(list(chunk), model, tokenizer) for chunk in chunks])


def _embed_chunk(prompts: list[str], model: Any, tokenizer: Any) -> FeatureArray:
    # Cut by the tokenizer, the prompt keeps its end token, whose state is the embedding; torchmetrics loses it.
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(model.device)
    text = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    embeddings: FeatureArray = model.text_projection(text.pooler_output).float().cpu().numpy()
    return embeddings


def _unit_rows(rows: FeatureArray) -> FeatureArray:
    unit: FeatureArray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _source_folder(weights: str | None, folder: Path, names: Sequence[str], mend: str) -> Path:
    """A folder as it is, what an object-store prefix names, or the hub's; it holds all these files."""
    if weights is None:
        return hub_folder(_HUB_ID, names, mend, _HUB_REVISIONS)
    source = fetched(weights, names, folder, mend) if "://" in weights else user_path(weights)
    if missing := [name for name in names if not (source / name).is_file()]:
        raise unavailable(f"There is no {' and no '.join(missing)} in {weights}; pickles are not read", mend)
    return source
