"""Where theta_0 comes from."""

from typing import Self

from pydantic import Field, model_validator

from deme_core.recipe.base import JsonMapping, Spec
from deme_core.recipe.training import TrainingSpec

# Of both UNets of diffusers.
_DEFAULT_NUM_LEVELS = 4


class PretrainedSpec(Spec):
    """Where the pretrained model comes from."""

    source: str = Field(description="'pretrain', a diffusers folder, an object-store URI, or a hub id.")
    revision: str | None = Field(None, description="Git revision of a hub id.")
    allow_pickle: bool = Field(False, description="Accept pickled weights (read with weights_only=True).")
    unet: JsonMapping = Field(
        default_factory=dict, description="UNet2DModel config, for source 'pretrain'; size and channels are the data's."
    )
    noise_scheduler: JsonMapping = Field(
        default_factory=dict, description="DDPMScheduler config, for source 'pretrain'."
    )
    text_encoder: JsonMapping | None = Field(
        None,
        description="T5 config, for source 'pretrain' of a model that takes text: unet is then that of a "
        "UNet2DConditionModel, and the encoder, whose random weights stay, knows the words of the captions.",
    )
    training: TrainingSpec | None = Field(None, description="How to pretrain, for source 'pretrain'.")

    @property
    def num_blocks(self) -> int:
        """Blocks of the UNet that is trained here, as `merge_methods.block_weights` counts them; 1 of other models."""
        if self.source != "pretrain":
            return 1
        has_mid = self.unet.get("mid_block_type", "default") is not None
        channels = self.unet.get("block_out_channels")
        # What is no list is told where the model is built.
        return (len(channels) if isinstance(channels, list) else _DEFAULT_NUM_LEVELS) + has_mid + 1

    @model_validator(mode="after")
    def _training_belongs_to_pretrain(self) -> Self:
        if self.source == "pretrain" and self.training is None:
            raise ValueError("source 'pretrain' needs pretrained.training (at least num_steps)")
        if self.source != "pretrain" and (
            self.training or self.unet or self.noise_scheduler or self.text_encoder is not None
        ):
            raise ValueError(
                "training, unet, noise_scheduler and text_encoder apply to source 'pretrain' only; leave them out"
            )
        return self
