"""Which images a run trains on and compares with."""

from string import Formatter
from typing import Literal, Self

from pydantic import Field, model_validator

from deme_core.recipe.base import Precision, Probability, Spec

DEFAULT_IMAGE_COLUMN = "image"
_DIGITS_SIDE = 8
_MAX_BYTES_OF_NAME = 255


class DatasetSpec(Spec):
    """Which images, and how they are brought to one size."""

    source: Literal["digits", "imagefolder", "webdataset", "hub"] = Field(description="Where the images come from.")
    path: str | None = Field(
        None,
        description="A folder, a zip (imagefolder) or tar (webdataset), an object-store prefix, or a datasets name.",
    )
    name: str | None = Field(None, description="Configuration of a datasets name.")
    split: str = Field("train", description="Split of a datasets name.")
    image_column: str = Field(
        DEFAULT_IMAGE_COLUMN,
        description="Column of a datasets name that holds the images; or their extension, in tars with several.",
    )
    caption_column: str | None = Field(
        None,
        description="What holds captions, for text-conditional models: a column of a datasets name, a key of "
        "metadata.jsonl, an extension or a JSON key in tars.",
    )
    caption_template: str | None = Field(
        None, description="Captions made from columns instead, e.g. 'a photo of a {label}'."
    )
    caption_dropout: Probability = Field(
        0.0,
        description="Chance that training sees the empty caption, or no label, instead: for classifier-free guidance.",
    )
    label_column: str | None = Field(
        None, description="What holds class labels; without a column 'label' that is the sub-folder of each image."
    )
    resolution: int | None = Field(None, ge=4, description="Side of the square images, in pixels; digits are 8.")
    channels: Literal[1, 3] | None = Field(None, description="Grey (1) or RGB (3); default 3, digits 1.")
    crop: Literal["center", "random"] = Field("center", description="Which square is cut out after resizing.")
    random_flip: bool = Field(False, description="Mirror half of the training images left to right.")
    cache_latents: bool | None = Field(
        None,
        description="Encode images and captions once and train on that, for models on latents; default yes, unless "
        "crop is random or stream is set.",
    )
    cache_precision: Precision = Field(
        "fp32", description="How the cache stores numbers; bf16 and fp16 take half the bytes."
    )
    stream: bool = Field(
        False,
        description="webdataset below an object-store prefix: keep no copy of it, but read the tars through a bounded "
        "cache, for data sets larger than a disk. Images then train in another order.",
    )
    stream_window: int = Field(
        8, ge=1, description="stream: number of tars, drawn at random, whose images are mixed at a time."
    )
    cache_gb: float = Field(
        50.0, gt=0, description="stream: bound of the cache on each machine, 10^9 bytes; each training needs a window."
    )
    num_images: int | None = Field(
        None,
        ge=1,
        description="Use only the first so many: by path in folders and zips (of folders by class those of the first "
        "classes), by tar and member in tars, by row in data sets of the hub.",
    )
    num_heldout_images: int | None = Field(
        None, ge=2, description="Images that no training sees, for the held-out loss; default a tenth, at most 500."
    )
    skip_broken: bool = Field(
        False, description="Leave out images that cannot be decoded; otherwise they are an error."
    )

    @property
    def num_channels(self) -> int:
        """Channels of the images: 1 or 3."""
        return self.channels or (1 if self.source == "digits" else 3)

    @property
    def side(self) -> int:
        """Pixels of a side of the images, which are square."""
        return self.resolution or _DIGITS_SIDE

    @property
    def is_encoded(self) -> bool:
        """Whether latents and embeddings are computed before the trainings, where the model has any."""
        return self.crop == "center" and not self.stream if self.cache_latents is None else self.cache_latents

    @model_validator(mode="after")
    def _path_and_resolution(self) -> Self:
        if self.source != "digits" and self.path is None:
            raise ValueError(f"source '{self.source}' needs a path")
        if self.source != "digits" and self.resolution is None:
            raise ValueError(f"source '{self.source}' needs a resolution")
        if max(len(name.encode()) for name in str(self.path).split("/")) > _MAX_BYTES_OF_NAME:
            raise ValueError(f"path has a name of more than {_MAX_BYTES_OF_NAME} bytes, which no file can have")
        return self

    @model_validator(mode="after")
    def _cache(self) -> Self:
        if self.cache_latents and self.crop == "random":
            raise ValueError("cache_latents needs crop: center, since every random crop has latents of its own")
        if self.stream and (self.source != "webdataset" or not str(self.path).startswith(("s3://", "file://"))):
            raise ValueError("stream needs source webdataset, and as its path a prefix of an object store")
        if self.stream and self.cache_latents:
            raise ValueError("cache_latents keeps all latents on disk; leave it out where stream is set")
        return self

    @model_validator(mode="after")
    def _captions(self) -> Self:
        if self.caption_column is not None and self.caption_template is not None:
            raise ValueError("give either caption_column or caption_template")
        if self.caption_dropout and not (self.caption_column or self.caption_template or self.label_column):
            raise ValueError("caption_dropout needs caption_column, caption_template or label_column")
        try:
            fields = [parsed[1:] for parsed in Formatter().parse(self.caption_template or "")]
        except ValueError as error:
            raise ValueError(f"caption_template '{self.caption_template}' is malformed ({error})") from error
        if any(field != (None, None, None) and (not field[0] or field[1] or field[2]) for field in fields):
            raise ValueError("caption_template takes names of columns in braces and nothing else, as in '{label}'")
        return self
