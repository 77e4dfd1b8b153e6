"""Where theta_0 comes from."""

from itertools import takewhile
from typing import Self

from pydantic import Field, model_validator

from deme_core.recipe.base import JsonMapping, Spec
from deme_core.recipe.training import TrainingSpec

# Of both UNets of diffusers.
_DEFAULT_NUM_LEVELS = 4
# Of a UNet2DConditionModel: these enlarge to the side that was halved, odd or not; others, and a UNet2DModel's, double.
# None are those that it has by default.
_ENLARGE_TO_ANY_SIDE = (None, "CrossAttnUpBlock2D", "UpBlock2D")


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

    @property
    def side_divisor(self) -> int:
        """Number that the side of images must be a multiple of for the UNet that is trained here; 1 if none is known.

        A UNet halves the side at each level but the last, and doubles it on the way back: an odd side comes back larger
        or smaller than it was.
        """
        if self.source != "pretrain":
            return 1
        names = ("block_out_channels", "down_block_types", "up_block_types")
        given = [self.unet.get(name, [None] * _DEFAULT_NUM_LEVELS) for name in names]
        levels = [level for level in given if isinstance(level, list) and level]
        # What is no list, or not as long as the others, is told where the model is built.
        if len(levels) < len(names) or len({len(level) for level in levels}) > 1:
            return 1
        outermost_first = levels[-1][-2::-1]
        if self.text_encoder is not None:
            doubling = takewhile(lambda kind: kind not in _ENLARGE_TO_ANY_SIDE, outermost_first)
            return 2 ** len(list(doubling))
        return 2 ** len(outermost_first)

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
