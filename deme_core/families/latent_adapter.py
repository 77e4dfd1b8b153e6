"""What the families on latents share: a frozen autoencoder between images and what the denoiser works on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

import torch

from deme_core.errors import InputError, ModelFolderError
from deme_core.families.adapter import Adapter
from deme_core.model_json import INDEX_NAME, read_json
from deme_core.noise_process import Diffusion, NoiseProcess

_TEXT = "_text_pipeline"


class LatentAdapter(Adapter):
    """An adapter of a pipeline with a ``vae``, and most often text encoders.

    Attributes:
        parts_left_out: parts of the pipeline that no prompt goes through.
    """

    parts_left_out: ClassVar[tuple[str, ...]] = ()

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, float32; it takes one image at a time, so that memory does not grow with the batch."""
        vae = self._load("vae")
        vae.enable_slicing()
        return vae

    @property
    def text_pipeline(self) -> Any:
        """The stock pipeline without denoiser and autoencoder: its tokenizers and text encoders, ready to work."""
        for encoder in self._text_encoders():
            encoder.to(self.device)
        return self._text_pipeline

    @cached_property
    def _text_pipeline(self) -> Any:
        import diffusers

        index = self._index
        absent = [name for name, (library, _) in index.items() if library is None]
        parts: dict[str, Any] = dict.fromkeys(("vae", *self.parts_left_out, *absent))
        parts[self.denoiser_part] = self.denoiser_of_text_pipeline()
        parts |= {name: self._load(name) for name in index if name.startswith("text_encoder") and name not in absent}
        with _no_progress_bars():
            return getattr(diffusers, self.pipeline).from_pretrained(self.frozen, local_files_only=True, **parts)

    def denoiser_of_text_pipeline(self) -> Any:
        """Returns what stands for the denoiser while prompts are encoded."""
        return None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image: latents times the autoencoder's factor."""
        config = read_json(self.frozen / "vae" / "config.json")
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        _, height, width = self.latent_shape
        return config["in_channels"], factor * height, factor * width

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the mean of the autoencoder's posterior, shifted and scaled as the denoiser knows it.

        The mean and not a draw: it can be cached, and the posterior of such autoencoders is narrow.

        Raises:
            InputError: the images are not of the size that the model makes.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            found, wanted = (" x ".join(map(str, shape)) for shape in (images.shape[1:], self.image_shape))
            raise InputError(
                f"The images are {found}, but the {self.pipeline} makes {wanted}; set dataset.resolution "
                f"to {self.image_shape[1]} and dataset.channels to {self.image_shape[0]}."
            )
        latents = self.vae.to(self.device).encode(images.to(self.device)).latent_dist.mode()
        return (latents - self._shift) * self._scale

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the images that latents stand for."""
        return self.vae.to(self.device).decode(latents / self._scale + self._shift).sample

    @property
    def _scale(self) -> float:
        return float(self.vae.config.scaling_factor)

    @property
    def _shift(self) -> float:
        return float(self.vae.config.shift_factor or 0.0)

    @property
    def _index(self) -> dict[str, list[Any]]:
        index = read_json(self.frozen / INDEX_NAME)
        return {name: part for name, part in index.items() if isinstance(part, list)}

    def _load(self, part: str) -> Any:
        """Loads a frozen model, float32.

        Raises:
            ModelFolderError: it does not hold all tensors of its class, which stock loaders start at random.
        """
        library, class_name = self._index[part]
        with _no_progress_bars():
            model, info = getattr(import_module(library), class_name).from_pretrained(
                self.frozen / part, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        if missing := sorted(info["missing_keys"]):
            raise ModelFolderError(f"{self.frozen / part} misses the tensors {', '.join(missing)}; fetch it again.")
        return model.eval().requires_grad_(False).to(self.device)

    def _text_encoders(self) -> list[Any]:
        parts = self._text_pipeline.components
        return [part for name, part in parts.items() if name.startswith("text_encoder") and part is not None]

    def rest(self) -> None:
        """Moves autoencoder and text encoders, if they are loaded, to main memory until they are needed again."""
        loaded = vars(self)
        for part in [*([self.vae] if "vae" in loaded else []), *(self._text_encoders() if _TEXT in loaded else [])]:
            part.to("cpu")

    def release(self) -> None:
        """Forgets autoencoder and text encoders."""
        for part in ("vae", _TEXT):
            vars(self).pop(part, None)


class DiffusionOnLatents(LatentAdapter):
    """A latent adapter whose noise is that of DDPM."""

    # Latents have no range to be clipped to, and DDIM clips where a config is silent.
    scheduler_overrides: ClassVar[Mapping[str, Any]] = {"clip_sample": False}

    @cached_property
    def noise_process(self) -> NoiseProcess:
        """Diffusion, by the model's own scheduler config."""
        return Diffusion.from_config(self.scheduler_config)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps the libraries from drawing bars of their own for parts that load within seconds."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    drawing = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in drawing:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in drawing:
            log.enable_progress_bar()
