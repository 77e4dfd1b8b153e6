"""How rows are scored."""

from typing import Literal, Self

from pydantic import Field, model_validator

from deme_core.extractor_names import FIXED_SIDES, OF_ANY_RESOLUTION, ExtractorMode, ExtractorName, mode_name
from deme_core.metrics import METRICS, MetricName, deciding_metric, metric_names, needs_prompts
from deme_core.recipe.base import Precision, Spec
from deme_core.recipe.dataset import DatasetSpec

Sampler = Literal["ddim", "ddpm", "flow_match_euler"]


class EvaluateSpec(Spec):
    """How every row is sampled and scored: the same for all rows (METHOD section 5.3)."""

    num_images: int = Field(ge=2, description="Images generated per row and seed.")
    seeds: tuple[int, ...] = Field(
        (1, 2, 3), min_length=3, description="Sampling seeds, all different; at least three for an interval."
    )
    sampler: Sampler = Field(
        "ddim", description="Sampler of the reverse process; flow_match_euler for flow-matching models, and only those."
    )
    num_inference_steps: int = Field(50, ge=1, description="Sampling steps.")
    eta: float = Field(0.0, ge=0, le=1, description="Noise of DDIM; 0 is deterministic.")
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        None,
        description="Spacing of the sampling timesteps; default the model's own scheduler config, but leading for ddim "
        "where that is linspace.",
    )
    # Left out of a dump where it is the default, as are others below: digests made before there was a choice stay.
    guidance_scale: float = Field(
        1.0,
        ge=1,
        exclude_if=lambda scale: bool(scale == 1.0),
        description="Classifier-free guidance: unconditional + scale * (conditional - unconditional); 1 is none.",
    )
    mixed_precision: Precision = Field(
        "fp32",
        exclude_if=lambda precision: bool(precision == "fp32"),
        description="Autocast type of the denoiser while it samples, a condition of all scores; the autoencoder and "
        "held-out losses stay fp32.",
    )
    batch_size: int = Field(
        64,
        ge=1,
        description="Images per sampling batch; another changes images by rounding alone, in single grey levels.",
    )
    extractor: ExtractorName = Field(
        "inception", description="Feature extractor; distances are named after it. pixels_4x4 are colours alone."
    )
    # Left out of a dump where there are none: digests made before there could be several stay.
    more_extractors: tuple[ExtractorName, ...] = Field(
        (),
        exclude_if=lambda names: not names,
        description="More extractors, with their libraries' own weights: every metric is reported of their features, "
        "too, and may guard a search (merge.search.guards).",
    )
    # Left out of a dump where it is the default: digests made before there were modes stay.
    extractor_mode: ExtractorMode = Field(
        "clean",
        exclude_if=lambda mode: bool(mode == "clean"),
        description="inception: network and resizing as clean-fid's mode of that name, to compare with older numbers.",
    )
    extractor_weights: str | None = Field(
        None,
        description="Path or object-store URI of the extractor's weights: a file, for clip_vit_b_32 a folder as "
        "transformers saves it; default the library's own.",
    )
    extractor_resolution: int | None = Field(
        None,
        ge=32,
        description="Side images are resized to for efficientnet_lite0 and _lite2; default 224 and 260. inception is "
        "always 299.",
    )
    # Left out of a dump where there are none: digests made before there were prompts stay.
    prompts: str | None = Field(
        None,
        exclude_if=lambda prompts: prompts is None,
        description="Path or object-store URI of prompts, one per line; or a .tsv or .csv file with a column Prompt or "
        "caption, a .json list of texts or COCO's captions file, or a .jsonl file with text, caption or prompt; or "
        "imagenet1k or cifar10, a photo of each class. Image i belongs to prompt i modulo their number.",
    )
    clip_weights: str | None = Field(
        None,
        exclude_if=lambda weights: weights is None,
        description="clip_score: path or object-store URI of a CLIP model's folder; default ViT-B/32 from the hub.",
    )
    metrics: tuple[MetricName, ...] = Field(
        ("fid", "kid"), min_length=1, description="What is computed; the first is searched and decides the verdict."
    )
    kid_subset_size: int = Field(1000, ge=2, description="Images per subset of the KID estimate.")
    num_reference_images: int | None = Field(
        None, ge=2, description="Real images in the reference; default all that the search does not set aside."
    )
    reference_dataset: DatasetSpec | None = Field(
        None,
        exclude_if=lambda dataset: dataset is None,
        description="Real images for the report's reference and the search's, where they are not those of dataset.",
    )
    num_bootstrap: int = Field(
        100,
        ge=0,
        description="Number of bootstrap resamples for the verdict's second interval: 0 (none), or 2 and more.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ from one another")
        if self.extractor == "pixels_4x4" and self.extractor_weights is not None:
            raise ValueError("extractor_weights: pixels_4x4 has none")
        if self.extractor in self.more_extractors or len(set(self.more_extractors)) != len(self.more_extractors):
            raise ValueError("more_extractors must differ from extractor and from one another")
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError("metrics must differ from one another")
        if deciding_metric(self.metrics[0]) is None:
            able = ", ".join(metric for metric in METRICS if deciding_metric(metric))
            raise ValueError(f"metrics must begin with one of {able}: {self.metrics[0]} alone does not decide")
        if self.num_bootstrap == 1:
            raise ValueError("num_bootstrap must be 0 or at least 2: one resample has no spread")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta is the noise of ddim, and {self.sampler} ignores it; leave it 0")
        if needs_prompts(self.metrics) and self.prompts is None:
            raise ValueError("clip_score needs prompts; set evaluate.prompts to a text file with one per line")
        side = FIXED_SIDES.get(self.extractor)
        if self.extractor not in OF_ANY_RESOLUTION and self.extractor_resolution not in (None, side):
            defined = f"is defined at {side} pixels only" if side else "takes images as they are"
            raise ValueError(f"extractor_resolution: {self.extractor} {defined}; leave it null")
        if self.extractor != "inception" and self.extractor_mode != "clean":
            raise ValueError(f"extractor_mode {self.extractor_mode} is a mode of inception, not of {self.extractor}")
        return self

    @property
    def extractor_name(self) -> str:
        """The extractor together with its mode: what `load_extractor` loads and `metric_name` names scores after."""
        return mode_name(self.extractor_mode) if self.extractor == "inception" else self.extractor

    @property
    def extractor_names(self) -> tuple[str, ...]:
        """All extractors, the one that decides first: what `load_extractors` loads."""
        return (self.extractor_name, *self.more_extractors)

    @property
    def score_names(self) -> list[str]:
        """The names of all scores, the deciding one first."""
        return metric_names(self.metrics, self.extractor_names)
