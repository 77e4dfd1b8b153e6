"""The adapter: what DeMe asks of a family of pipelines, with the answers that most of them share."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from deme_core.errors import InputError, ModelFolderError

# Others import it from here.
from deme_core.images.training_batch import NO_LABEL as NO_LABEL
from deme_core.images.training_batch import CropSizes
from deme_core.noise_process import BETA_SCHEDULERS, Diffusion, NoiseProcess

ConditioningTensors = dict[str, torch.Tensor]
# More than any model has; a config may name numbers for which no machine has memory.
_MAX_TIMESTEPS = 100_000
_MAX_NUMBERS = 2**28


def whole_number(config: Mapping[str, Any], name: str, *, file: str = "The config.json of the denoiser") -> int:
    """Returns a size or number that the config of a part gives.

    Raises:
        ModelFolderError: it gives none, or none above 0.
    """
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ModelFolderError(f"{file} gives {name} as {value!r}, not as a whole number above 0.")
    return value


def check_shape(channels: int, height: int, width: int) -> tuple[int, int, int]:
    """Returns the shape of an image or its latents, (C, H, W).

    Raises:
        ModelFolderError: it is larger than any model's.
    """
    if channels * height * width > _MAX_NUMBERS:
        shape = f"{channels} x {height} x {width}"
        raise ModelFolderError(f"The configs of the model give its images or latents as {shape}, which none is.")
    return channels, height, width


class Adapter:
    """Everything about one model but its denoiser's weights.

    Attributes:
        pipelines: classes of diffusers that it is for, as ``model_index.json`` names them.
        denoiser_classes: classes of the denoiser, as its config.json names them.
        denoiser_part: subfolder of the denoiser.
        frozen_parts: subfolders that the pipeline cannot do without, besides denoiser and scheduler.
        conditioned_on: what the denoiser is told beside the timestep.
        scheduler_overrides: what sampling and training take otherwise than scheduler_config.json says.
        schedulers: classes of the scheduler whose configs say how such a model is noised.

    Args:
        denoiser_config: config.json of the denoiser.
        scheduler_config: scheduler_config.json.
        pipeline: class of the pipeline.
        frozen: folder with the frozen parts; None if there are none, or they are not at hand.
        device: where frozen parts work, and where what they return lies.
    """

    pipelines: ClassVar[tuple[str, ...]]
    denoiser_classes: ClassVar[tuple[str, ...]]
    denoiser_part: ClassVar[str]
    frozen_parts: ClassVar[tuple[str, ...]] = ()
    conditioned_on: ClassVar[Literal["nothing", "captions", "labels"]] = "nothing"
    scheduler_overrides: ClassVar[Mapping[str, Any]] = {}
    schedulers: ClassVar[tuple[str, ...]] = BETA_SCHEDULERS

    def __init__(
        self,
        *,
        denoiser_config: Mapping[str, Any],
        scheduler_config: Mapping[str, Any],
        pipeline: str | None = None,
        frozen: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.denoiser_config = denoiser_config
        self.scheduler_config = {**scheduler_config, **self.scheduler_overrides}
        self.pipeline, self.device = pipeline or self.pipelines[0], device
        self._frozen = frozen

    @classmethod
    def unsupported(cls, denoiser_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> str | None:
        """Returns what a model of these two configs has that DeMe cannot train or sample; None if it can.

        A scheduler's config means what its class says: flow matching's, read as betas, would noise images otherwise
        than the model knows them.
        """
        timesteps = scheduler_config.get("num_train_timesteps", 1000)
        if type(timesteps) is not int or not 1 <= timesteps <= _MAX_TIMESTEPS:
            return f"num_train_timesteps {timesteps!r}, which is no whole number from 1 to {_MAX_TIMESTEPS:,}"
        scheduler = scheduler_config.get("_class_name", cls.schedulers[0])
        if scheduler not in cls.schedulers:
            return f"a {scheduler}, and not one of {', '.join(cls.schedulers)}"
        if scheduler_config.get("use_flow_sigmas"):
            return f"a {scheduler} with use_flow_sigmas, a flow-matching model in the clothes of another"
        if scheduler_config.get("timestep_type") == "continuous":
            return (
                f"a {scheduler} with continuous timesteps, of which the denoiser is told the noise and not the number"
            )
        if (
            scheduler_config.get("rescale_betas_zero_snr")
            and scheduler_config.get("prediction_type", "epsilon") == "epsilon"
        ):
            return (
                "rescale_betas_zero_snr, under which the last timestep is noise alone, of which a prediction_type of "
                "epsilon tells no image"
            )
        if denoiser_config.get("time_cond_proj_dim"):
            return "a denoiser that is told the guidance (time_cond_proj_dim), as consistency models are"
        return None

    @property
    def frozen(self) -> Path:
        """Folder with the frozen parts.

        Raises:
            ModelFolderError: they are not at hand, as beside a copy that was finetuned.
        """
        if self._frozen is None:
            raise ModelFolderError(
                f"The folder holds the denoiser of a {self.pipeline} alone; give the whole pipeline, as a merged model "
                "or the pretrained one is."
            )
        return self._frozen

    @cached_property
    def noise_process(self) -> NoiseProcess:
        """How images are noised, and what is predicted: diffusion, by the model's own scheduler config."""
        return Diffusion.from_config(self.scheduler_config)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the denoiser works on.

        Raises:
            ModelFolderError: its config does not say it.
        """
        size = self.denoiser_config.get("sample_size")
        pair = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        height, width = (whole_number({"sample_size": side}, "sample_size") for side in pair)
        return check_shape(whole_number(self.denoiser_config, "in_channels"), height, width)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.latent_shape

    @property
    def num_classes(self) -> int:
        """Number of class labels; 0 for a model that takes none."""
        return 0

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Returns latents, float32 (B, C, H, W), of images, float32 (B, 3, H', W') in [-1, 1]; always the same.

        Raises:
            InputError: the images are not of the size that the model makes.
        """
        self._check_shape(images)
        return images.to(self.device)

    def _check_shape(self, images: torch.Tensor) -> None:
        if tuple(images.shape[1:]) != self.image_shape:
            found, wanted = (" x ".join(map(str, shape)) for shape in (images.shape[1:], self.image_shape))
            raise InputError(
                f"The images are {found}, but the {self.pipeline} makes {wanted}; set dataset.resolution "
                f"to {self.image_shape[1]} and dataset.channels to {self.image_shape[0]}."
            )

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images, float32 (B, 3, H', W'), about in [-1, 1], of latents."""
        return latents

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """What decides, beside the files of the text encoders, what `encode_prompts` returns, where it is not usual."""
        return {}

    def encode_prompts(self, texts: Sequence[str]) -> ConditioningTensors:
        """Returns the tensors, each (B, ...), that B texts become; the empty text is what guidance steers away from."""
        return {}

    def encode_labels(self, labels: Sequence[int]) -> ConditioningTensors:
        """Returns the tensors, each (B, ...), that B class labels become; -1 stands for no class."""
        return {}

    def check_labels(self, labels: Sequence[int]) -> None:
        """Raises an InputError if the model does not know a class."""
        if unknown := sorted({label for label in labels if not NO_LABEL <= label < self.num_classes}):
            found = ", ".join([*map(str, unknown[:5]), *(["…"] if unknown[5:] else [])])
            raise InputError(
                f"The {self.pipeline} knows the classes 0 to {self.num_classes - 1}, but there are images of class "
                f"{found}; check dataset.label_column (WordNet ids have the numbers of ImageNet-1k; metadata.jsonl can "
                "have any numbers)."
            )

    def encode_sizes(self, batch_size: int, sizes: CropSizes | None = None) -> ConditioningTensors:
        """Returns the tensors, each (B, ...), that sizes become; without any, those of images of the model's own size.

        Args:
            batch_size: B.
            sizes: of B images.
        """
        return {}

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: ConditioningTensors
    ) -> torch.Tensor:
        """Returns what ``denoiser`` predicts for noisy latents (B, C, H, W), in their shape.

        Args:
            denoiser: any copy of the family's denoiser.
            noisy: x_t.
            timesteps: as the denoiser is told them, (B,).
            conditioning: tensors of the three ``encode_`` methods together.
        """
        # A model that learned its variance predicts it in as many channels again, which no part of DeMe uses.
        return denoiser(noisy, timestep=timesteps, **conditioning).sample[:, : noisy.shape[1]]

    def prepare_training(self, denoiser: nn.Module) -> None:
        """Changes what only matters while ``denoiser`` is trained."""

    def timestep_settings(self, num_inference_steps: int) -> dict[str, Any]:
        """Returns what the sampler's ``set_timesteps`` needs besides the number of steps."""
        return {}

    def rest(self) -> None:
        """Moves the frozen parts that were loaded to main memory until they are needed again."""
