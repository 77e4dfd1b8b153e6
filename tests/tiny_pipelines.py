"""Real diffusers pipelines with every part of them, small enough to build, train and run within seconds.

All are on 16 x 16 images; an autoencoder of two levels makes 8 x 8 latents of them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

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


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Returns a T5Tokenizer that knows letters and ``WORDS``."""
    pieces = ["\u2581", *(f"\u2581{word}" for word in WORDS if len(word) > 1), *map(chr, range(97, 123))]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -float(len(pieces))) for piece in pieces)]
    return T5Tokenizer(vocab=scores, extra_ids=0)


def tiny_t5(seed: int, **overrides: Any) -> T5EncoderModel:
    """Returns a T5 encoder of one layer."""
    torch.manual_seed(seed)
    config = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(**{**config, **overrides})).eval()


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


def stable_diffusion_xl() -> DiffusionPipeline:
    """Returns a StableDiffusionXLPipeline with the scheduler that the published one has."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(force_upcast=True),
        text_encoder=tiny_clip(2, tokenizer),
        text_encoder_2=tiny_clip(3, tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )


def dit() -> DiffusionPipeline:
    """Returns a DiTPipeline that learned its variance and knows 1000 classes, as its sampler takes for granted."""
    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        attention_bias=True,
    )
    return DiTPipeline(transformer=_vary(transformer), vae=tiny_vae(), scheduler=DDIMScheduler(clip_sample=False))


def pixart(kind: Any = PixArtAlphaPipeline) -> DiffusionPipeline:
    """Returns a PixArtAlphaPipeline, or one of another class, with the scheduler that the published ones have."""
    torch.manual_seed(1)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
    )
    return kind(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(2),
        vae=tiny_vae(),
        transformer=_vary(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )


def pixart_sigma() -> DiffusionPipeline:
    """Returns a PixArtSigmaPipeline."""
    return pixart(PixArtSigmaPipeline)


def stable_diffusion_3() -> DiffusionPipeline:
    """Returns a StableDiffusion3Pipeline with all three text encoders and the shift of the published one."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=_vary(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=tiny_clip(2, tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=tiny_clip(3, tokenizer, CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=tiny_t5(4, d_model=32),
        tokenizer_3=tiny_t5_tokenizer(),
    )


def flux(**overrides: Any) -> DiffusionPipeline:
    """Returns a FluxPipeline of a guided, distilled model, whose scheduler shifts by resolution."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    }
    return FluxPipeline(
        transformer=_vary(FluxTransformer2DModel(**{**config, **overrides})),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=tiny_clip(2, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(4, d_model=32),
        tokenizer_2=tiny_t5_tokenizer(),
    )


def deepfloyd_if() -> DiffusionPipeline:
    """Returns an IFPipeline: on pixels, and with a variance beside the noise."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return IFPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(2),
        unet=unet.eval(),
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def _vary(transformer: Any) -> Any:
    """Adds noise to all weights: fresh transformers begin with gates at zero, and nothing in them would count."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.1)
    return transformer.eval()


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "DiTPipeline": dit,
    "PixArtAlphaPipeline": pixart,
    "PixArtSigmaPipeline": pixart_sigma,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "IFPipeline": deepfloyd_if,
}


def save_pipeline(name: str, path: Path) -> Path:
    """Writes the pipeline ``name`` as stock diffusers does."""
    PIPELINES[name]().save_pretrained(path)
    if name == "FluxPipeline":  # Its config does not say how large its images are.
        config = path / "transformer" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 8}))
    return path
