"""What the families on latents share: a frozen autoencoder between images and what the denoiser works on."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch

from deme_core.errors import ModelFolderError
from deme_core.families.adapter import check_shape, whole_number
from deme_core.families.frozen_parts import FrozenPartsAdapter
from deme_core.model_json import read_json
from deme_core.noise_process import FLOW_SCHEDULERS, FlowMatching, NoiseProcess
from deme_core.tf32 import without_tf32

# Each halves the image: more than any image can be halved.
_MAX_BLOCKS = 16


class LatentAdapter(FrozenPartsAdapter):
    """An adapter of a pipeline with a ``vae``, and most often text encoders."""

    parts_left_out: ClassVar[tuple[str, ...]] = ("vae",)

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, float32; it takes one image at a time, so that memory does not grow with the batch.

        Raises:
            ModelFolderError: it is no autoencoder of such latents, or does more to them than to shift and scale them.
        """
        vae, path = self._load("vae"), self.frozen / "vae"
        is_autoencoder = all(hasattr(vae, name) for name in ("encode", "decode", "enable_slicing"))
        scale, shift = (getattr(vae.config, name, None) for name in ("scaling_factor", "shift_factor"))
        if not is_autoencoder or not isinstance(scale, int | float) or not isinstance(shift, int | float | None):
            raise ModelFolderError(f"{path} is no autoencoder with a scaling_factor; fetch it again.")
        if (found := getattr(vae.config, "latent_channels", None)) != (wanted := self.latent_shape[0]):
            raise ModelFolderError(f"{path} makes latents of {found} channels, and the denoiser takes {wanted}.")
        if getattr(vae.config, "latents_mean", None) is not None:
            raise ModelFolderError(f"{path} normalizes latents by latents_mean and latents_std, which DeMe does not.")
        vae.enable_slicing()
        return vae

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image: latents times the autoencoder's factor.

        Raises:
            ModelFolderError: the configs do not say it.
        """
        config = read_json(path := self.frozen / "vae" / "config.json")
        blocks = config.get("block_out_channels")
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= _MAX_BLOCKS:
            raise ModelFolderError(f"{path} lists no block_out_channels; fetch it again.")
        factor = 2 ** (len(blocks) - 1)
        _, height, width = self.latent_shape
        return check_shape(whole_number(config, "in_channels", file=str(path)), factor * height, factor * width)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the mean of the autoencoder's posterior, shifted and scaled as the denoiser knows it.

        The mean and not a draw: it can be cached, and the posterior of such autoencoders is narrow.

        Raises:
            InputError: the images are not of the size that the model makes.
        """
        self._check_shape(images)
        with without_tf32():
            latents = self.vae.to(self.device).encode(images.to(self.device)).latent_dist.mode()
        return (latents - self._shift) * self._scale

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the images that latents stand for."""
        with without_tf32():
            images: torch.Tensor = self.vae.to(self.device).decode(latents / self._scale + self._shift).sample
        return images

    @property
    def _scale(self) -> float:
        return float(self.vae.config.scaling_factor)

    @property
    def _shift(self) -> float:
        return float(self.vae.config.shift_factor or 0.0)

    def rest(self) -> None:
        """Moves autoencoder and text encoders, if they are loaded, to main memory until they are needed again."""
        if "vae" in vars(self):
            self.vae.to("cpu")
        super().rest()


class DiffusionOnLatents(LatentAdapter):
    """A latent adapter whose noise is that of DDPM."""

    # Latents have no range to be clipped to, and DDIM clips where a config is silent.
    scheduler_overrides: ClassVar[Mapping[str, Any]] = {"clip_sample": False}


class FlowMatchingOnLatents(LatentAdapter):
    """A latent adapter whose noise is that of flow matching."""

    schedulers = FLOW_SCHEDULERS
    # Its noise would depend on the batch.
    scheduler_overrides: ClassVar[Mapping[str, Any]] = {"stochastic_sampling": False}

    @cached_property
    def noise_process(self) -> NoiseProcess:
        """Flow matching."""
        return FlowMatching(int(self.scheduler_config.get("num_train_timesteps", 1000)))

    @property
    def num_tokens(self) -> int:
        """Tokens that an image is to the denoiser."""
        raise NotImplementedError

    def timestep_settings(self, num_inference_steps: int) -> dict[str, Any]:
        """Returns the shift of the timesteps where the scheduler makes it depend on the resolution."""
        if not self.scheduler_config.get("use_dynamic_shifting"):
            return {}
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler_config).config
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return {"mu": calculate_shift(self.num_tokens, *(config[name] for name in names))}
