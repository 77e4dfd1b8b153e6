"""A text-conditional model of which nothing is trained yet: what ``pretrained.source: pretrain`` starts from.

An `IFPipeline`, stock diffusers' pipeline of text on pixels. Its text encoder is a small T5 with random weights, which
stay as they are: each word of the captions gets states of its own, and that is all the denoiser needs to tell them
apart. Such an encoder knows the words and not what they mean: a word that no caption has says nothing.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from deme_core.errors import InputError
from deme_core.families.deepfloyd_if import DeepFloydIF
from deme_core.model_folder import ModelFolder, open_model_folder
from deme_core.seeds import derive_seed
from deme_core.untrained_parts import untrained_scheduler, untrained_unet

_MAX_WORDS = 10_000
_SPACE = "▁"  # What a T5 tokenizer puts before a word.


def write_untrained_text_model(
    path: Path,
    *,
    unet: Mapping[str, Any],
    noise_scheduler: Mapping[str, Any],
    text_encoder: Mapping[str, Any],
    captions: Iterable[str],
    image_shape: tuple[int, int, int],
    seed: int,
) -> ModelFolder:
    """Writes the pipeline into the folder ``path``; the same arguments give the same weights.

    Args:
        path: the folder, made if need be.
        unet: UNet2DConditionModel config, without image size, channels and width of the text.
        noise_scheduler: DDPMScheduler config.
        text_encoder: T5 config, without the size of the vocabulary.
        captions: whose words the tokenizer knows.
        image_shape: (C, H, W).
        seed: of all random weights.

    Raises:
        InputError: a part cannot be built.
    """
    from diffusers import IFPipeline, UNet2DConditionModel
    from transformers import T5EncoderModel

    try:
        tokenizer = _tokenizer(captions)
        config = untrained_text_unet(unet, text_encoder, image_shape)
        torch.manual_seed(derive_seed("text encoder", seed))
        encoder = T5EncoderModel(_t5_config(text_encoder, vocabulary=len(tokenizer)))
        torch.manual_seed(derive_seed("initial weights", seed))
        pipeline = IFPipeline(
            tokenizer=tokenizer,
            text_encoder=encoder,
            unet=UNet2DConditionModel.from_config(config),
            scheduler=untrained_scheduler(noise_scheduler, DeepFloydIF),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )
    except InputError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"pretrained.unet or text_encoder cannot be built: {' '.join(str(error).split())}.") from error
    pipeline.save_pretrained(path)
    return open_model_folder(path)


def untrained_text_unet(
    unet: Mapping[str, Any], text_encoder: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Returns the whole config of the denoiser, which predicts a variance beside the noise as IF's does."""
    channels, size, _ = image_shape
    width = _t5_config(text_encoder, vocabulary=2).d_model  # Pad and end of text, without which T5 complains.
    fixed = {"sample_size": size, "in_channels": channels, "out_channels": 2 * channels, "cross_attention_dim": width}
    return untrained_unet("UNet2DConditionModel", unet, fixed)


def _t5_config(settings: Mapping[str, Any], *, vocabulary: int) -> Any:
    from transformers import T5Config

    return T5Config(**{**settings, "vocab_size": vocabulary})


def _tokenizer(captions: Iterable[str]) -> Any:
    """Returns a tokenizer of the most frequent words of ``captions`` in lower case, as IF's pipeline has them."""
    from transformers import T5Tokenizer

    counts = Counter(word for caption in captions for word in re.split(r"\s+", caption.lower()) if word)
    words = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_WORDS]]
    letters = sorted({letter for word in words for letter in word})
    pieces = dict.fromkeys([_SPACE, *(f"{_SPACE}{word}" for word in words), *letters])
    # The longer a piece, the more probable: a known word is one token.
    scored = [(piece, -1.0 if len(piece) > 2 else -float(10 + index)) for index, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scored], extra_ids=0)
