"""Jobs that generate images, and measure models and real images."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, EvaluateSpec
from tasks.jobs.base import IMAGES_MEND, Job


class RealFeaturesJob(Job):
    """Extract the features of a slice of the real images set aside for the search, or of those the report uses.

    Attributes:
        num_for_search: images set aside for a search; None for half of the data set, 0 without a search.
        low: first image of the slice, among those of the part.
        high: end of the slice; it may lie beyond the last image.
    """

    stage: ClassVar[str] = "features"
    work: ClassVar[str] = "real_features"
    dataset: DatasetSpec
    evaluate: EvaluateSpec
    part: Literal["search", "report"]
    num_for_search: int | None
    low: int
    high: int


class ReferenceJob(Job):
    """Reduce the features of one part's real images to what scores need.

    Attributes:
        num_for_search: as in RealFeaturesJob.
        features: slices of the part, in order; how it was sliced is no part of the digest.
    """

    stage: ClassVar[str] = "reference"
    work: ClassVar[str] = "reference"
    version: ClassVar[int] = 2
    dataset: DatasetSpec
    evaluate: EvaluateSpec
    part: Literal["search", "report"]
    num_for_search: int | None
    features: tuple[ArtifactRef, ...]


class HeldoutJob(Job):
    """Measure the denoising loss by timestep on images that no training saw.

    Attributes:
        edges: edges of the timestep bins.
    """

    stage: ClassVar[str] = "heldout"
    work: ClassVar[str] = "heldout"
    model: ArtifactRef
    dataset: DatasetSpec
    edges: tuple[int, ...]


class GeneratedImages(BaseModel):
    """The set of images that one model, or the ensemble of experts, makes under one seed.

    Attributes:
        models: one model; or the experts, with ``edges``.
        edges: 0, inner edges, T of the experts' segments; None for one model.
        seed: names the set of initial noises.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[ArtifactRef, ...]
    edges: tuple[int, ...] | None
    seed: int


class GeneratedFeaturesJob(Job):
    """Generate a slice of an image set and extract its features; no image is written.

    Attributes:
        label: name for messages; no part of the result.
        images: the set.
        low: first image of the slice.
        high: end of the slice.
    """

    stage: ClassVar[str] = "features"
    work: ClassVar[str] = "generated_features"
    can_wait: ClassVar[bool] = True
    memory_mend: ClassVar[str] = IMAGES_MEND
    label: str
    images: GeneratedImages
    evaluate: EvaluateSpec
    low: int
    high: int

    @property
    def num_generated_images(self) -> int:
        """The slice's images."""
        return self.high - self.low


class EvaluateJob(Job):
    """Score an image set.

    Attributes:
        images: the set.
        features: its slices, in order; how it was sliced is no part of the digest.
    """

    stage: ClassVar[str] = "evaluate"
    work: ClassVar[str] = "evaluate"
    can_wait: ClassVar[bool] = True
    version: ClassVar[int] = 5
    images: GeneratedImages
    features: tuple[ArtifactRef, ...]
    evaluate: EvaluateSpec
    reference: ArtifactRef
