"""Families of diffusion pipelines: one thin adapter each, so that all else is one code path.

Decoupling, merging, searching and comparing are the same whatever is denoised. What differs between a DDPM on pixels
and Stable Diffusion 3 is little, and an `Adapter` says all of it:

- which pipelines it is for, where their denoiser lies (``unet/`` or ``transformer/``) and which parts stay frozen;
- how images become what the denoiser works on (`encode_images`; nothing to do on pixels, VAE latents otherwise), and
  back (`decode_latents`);
- how captions, labels and sizes become the tensors a denoiser is conditioned on (`encode_prompts`, `encode_labels`,
  `encode_sizes`): a dict of tensors, one row per image, so that they can be batched, cached and put in files;
- how noise is added and what the target is (`noise_process`): diffusion or flow matching;
- how the denoiser is called (`predict`).

Only the denoiser is trained, projected, merged and digested. Frozen parts are loaded when they are first needed: a
training step on cached latents and embeddings has neither VAE nor text encoder in memory. Wherever stock diffusers has
a piece, the adapter calls it: the pipelines' own ``encode_prompt``, ``AutoencoderKL``, the schedulers. What it does not
take is the pipelines' sampling loops: their noise depends on the batch, and they know one denoiser only, where an
ensemble has one for each segment.

A family is found by the class of the pipeline in ``model_index.json``, or, in a folder without one, by the class of
the denoiser. A new one is one file here and one line below.
"""

from deme_core.families.adapter import Adapter, ConditioningTensors
from deme_core.families.deepfloyd_if import DeepFloydIF
from deme_core.families.dit import DiT
from deme_core.families.encoded_batch import EncodedBatch, check_conditioned, encode_batch
from deme_core.families.flux import Flux
from deme_core.families.pixart import PixArt
from deme_core.families.stable_diffusion import StableDiffusion
from deme_core.families.stable_diffusion_3 import StableDiffusion3
from deme_core.families.stable_diffusion_xl import StableDiffusionXL
from deme_core.families.unconditional import Unconditional

__all__ = [
    "FAMILIES",
    "Adapter",
    "ConditioningTensors",
    "EncodedBatch",
    "Unconditional",
    "check_conditioned",
    "encode_batch",
]

_FAMILIES = (Unconditional, StableDiffusion, StableDiffusionXL, DiT, PixArt, StableDiffusion3, Flux, DeepFloydIF)
FAMILIES: dict[str, type[Adapter]] = {pipeline: family for family in _FAMILIES for pipeline in family.pipelines}
