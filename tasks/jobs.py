"""Jobs: the work of each stage as plain data, which a worker process can be sent.

How a job is done is in the module of `tasks.work` that it names; only workers import that, since it needs torch.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict

from deme_core.artifacts import ArtifactRef
from deme_core.recipe import (
    DatasetSpec,
    DistillSpec,
    EvaluateSpec,
    FinetuneSpec,
    MethodSpec,
    RegMeanSpec,
    SearchSpec,
    TrainingSpec,
)

PRETRAINED_STAGE = "pretrained"


class Job(BaseModel):
    """The work of one stage.

    Attributes:
        stage: first part of the artifact's key.
        work: module of `tasks.work` that does the job.
        version: part of the digest; raised when the work starts to give another result.
        leaves_checkpoints: whether the work can be resumed, and so leaves checkpoints in the store until it is done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: ClassVar[str]
    work: ClassVar[str]
    version: ClassVar[int] = 1
    leaves_checkpoints: ClassVar[bool] = False

    @property
    def num_generated_images(self) -> int:
        """How many images the work generates."""
        return 0

    @property
    def num_processes(self) -> int:
        """How many processes do it together, on a GPU each where there are any."""
        return 1


class PretrainJob(Job):
    """Train theta_0 from scratch on the data set, whose image size and channels it takes.

    Attributes:
        text_encoder: T5 config of a model that takes text; None for one that takes none.
    """

    stage: ClassVar[str] = PRETRAINED_STAGE
    work: ClassVar[str] = "pretrain"
    leaves_checkpoints: ClassVar[bool] = True
    dataset: DatasetSpec
    unet: dict[str, Any]
    noise_scheduler: dict[str, Any]
    training: TrainingSpec
    text_encoder: dict[str, Any] | None = None

    @property
    def num_processes(self) -> int:
        """As the training says."""
        return self.training.num_processes


class ImportJob(Job):
    """Bring a pretrained diffusers folder into the store, checked, as safetensors."""

    stage: ClassVar[str] = PRETRAINED_STAGE
    work: ClassVar[str] = "import_model"
    source: str
    revision: str | None = None
    allow_pickle: bool = False


class LatentsJob(Job):
    """Encode a slice of the data set's images by the autoencoder of a model.

    Attributes:
        pretrained: the model; its denoiser is no part of the digest.
        low: first image of the slice, among those of the whole data set.
        high: end of the slice; it may lie beyond the last image.
    """

    stage: ClassVar[str] = "latents"
    work: ClassVar[str] = "latents"
    pretrained: ArtifactRef
    dataset: DatasetSpec
    low: int
    high: int


class EmbeddingsJob(Job):
    """Encode a slice of the data set's distinct captions by the text encoders of a model.

    Attributes:
        pretrained: the model; its denoiser is no part of the digest.
        low: first caption of the slice.
        high: end of the slice; it may lie beyond the last caption.
    """

    stage: ClassVar[str] = "embeddings"
    work: ClassVar[str] = "embeddings"
    pretrained: ArtifactRef
    dataset: DatasetSpec
    low: int
    high: int


class FinetuneJob(Job):
    """Finetune a copy of theta_0 on the timesteps [low, high).

    Attributes:
        label: name for messages; no part of the result.
        num_steps: optimizer steps; N times ``finetune.num_steps`` for the control.
        latents: the whole data set encoded, slice by slice; without them images are encoded as they are trained on.
        embeddings: its distinct captions encoded, slice by slice.
    """

    stage: ClassVar[str] = "finetune"
    work: ClassVar[str] = "finetune"
    leaves_checkpoints: ClassVar[bool] = True
    label: str
    pretrained: ArtifactRef
    dataset: DatasetSpec
    finetune: FinetuneSpec
    low: int
    high: int
    num_steps: int
    latents: tuple[ArtifactRef, ...] = ()
    embeddings: tuple[ArtifactRef, ...] = ()

    @property
    def num_processes(self) -> int:
        """As the training says."""
        return self.finetune.num_processes


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


class SearchJob(Job):
    """Describe a search for the weights whose merge scores best on the search's own seeds and real images.

    The search itself is driven by `tasks.weight_search` and becomes an artifact of the stage ``weights``.

    Attributes:
        segment_edges: 0, inner edges, T of all segments.
        is_control: the only expert is the control, whose scale is searched.
    """

    stage: ClassVar[str] = "problem"
    work: ClassVar[str] = "search"
    version: ClassVar[int] = 3
    pretrained: ArtifactRef
    experts: tuple[ArtifactRef, ...]
    method: MethodSpec
    segment_edges: tuple[int, ...]
    is_control: bool
    search: SearchSpec
    evaluate: EvaluateSpec
    dataset: DatasetSpec
    reference: ArtifactRef


class CandidateJob(Job):
    """What a search measures of the merge of ``experts`` with ``weights``; nothing is written but the number.

    Attributes:
        label: name for messages; no part of the result.
        weights: as `deme_core.merge_methods.build_method` takes them.
    """

    stage: ClassVar[str] = "search"
    label: str
    pretrained: ArtifactRef
    experts: tuple[ArtifactRef, ...]
    method: MethodSpec
    weights: tuple[float, ...]


class ScoreJob(CandidateJob):
    """Score one candidate of a search.

    Attributes:
        evaluate: sampling; its first metric is the score.
        seeds: sampling seeds of the search.
        num_images: images per seed.
        reference: real images of the search.
    """

    work: ClassVar[str] = "score"
    evaluate: EvaluateSpec
    seeds: tuple[int, ...]
    num_images: int
    reference: ArtifactRef

    @property
    def num_generated_images(self) -> int:
        """All seeds' images."""
        return self.num_images * len(self.seeds)


class LossJob(CandidateJob):
    """Measure the denoising loss of one candidate in each segment, on images that no training saw.

    Attributes:
        segment_edges: 0, inner edges, T of all segments.
    """

    work: ClassVar[str] = "loss"
    dataset: DatasetSpec
    segment_edges: tuple[int, ...]


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


class GramsJob(Job):
    """Measure which inputs the linear maps of a finetuned copy see on its own segment [low, high)."""

    stage: ClassVar[str] = "grams"
    work: ClassVar[str] = "grams"
    expert: ArtifactRef
    dataset: DatasetSpec
    low: int
    high: int
    spec: RegMeanSpec


class ConfineJob(Job):
    """Confine the task vector of an expert to the inputs of its own segment.

    Attributes:
        grams: of all experts that are merged.
        index: which of them are this expert's.
    """

    stage: ClassVar[str] = "confined"
    work: ClassVar[str] = "confine"
    pretrained: ArtifactRef
    expert: ArtifactRef
    grams: tuple[ArtifactRef, ...]
    index: int
    spec: RegMeanSpec


class MergeJob(Job):
    """Merge experts into theta_0; with one expert, scale its task vector.

    Attributes:
        weights: as `deme_core.merge_methods.build_method` takes them.
    """

    stage: ClassVar[str] = "merged"
    work: ClassVar[str] = "merge"
    pretrained: ArtifactRef
    experts: tuple[ArtifactRef, ...]
    method: MethodSpec
    weights: tuple[float, ...]


class DistillJob(Job):
    """Train the merged model on all timesteps to predict what each segment's expert predicts.

    Attributes:
        label: name for messages; no part of the result.
        pretrained: theta_0, which holds the frozen parts.
        merged: where the training starts.
        experts: what it is taught by, lowest timesteps first.
        segment_edges: 0, inner edges, T of the experts' segments.
        latents: as in FinetuneJob.
        embeddings: as in FinetuneJob.
    """

    stage: ClassVar[str] = "distilled"
    work: ClassVar[str] = "distill"
    leaves_checkpoints: ClassVar[bool] = True
    label: str
    pretrained: ArtifactRef
    merged: ArtifactRef
    experts: tuple[ArtifactRef, ...]
    segment_edges: tuple[int, ...]
    dataset: DatasetSpec
    distill: DistillSpec
    latents: tuple[ArtifactRef, ...] = ()
    embeddings: tuple[ArtifactRef, ...] = ()

    @property
    def num_processes(self) -> int:
        """As the training says."""
        return self.distill.num_processes


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
    version: ClassVar[int] = 2
    images: GeneratedImages
    features: tuple[ArtifactRef, ...]
    evaluate: EvaluateSpec
    reference: ArtifactRef


_TRAINING = (PretrainJob, ImportJob, LatentsJob, EmbeddingsJob, FinetuneJob, DistillJob)
_MERGING = (GramsJob, ConfineJob, SearchJob, ScoreJob, LossJob, MergeJob)
_MEASURING = (RealFeaturesJob, ReferenceJob, HeldoutJob, GeneratedFeaturesJob, EvaluateJob)
JOBS: dict[str, type[Job]] = {job.__name__: job for job in (*_TRAINING, *_MERGING, *_MEASURING)}


@dataclass(frozen=True)
class JobResult:
    """What a job leaves behind.

    Attributes:
        ref: the artifact.
        metrics: numbers and names that later stages and the tracking need; the manifest holds them too.
        cached: whether the artifact existed already.
        seconds: time the job took.
        storage_seconds: the part of it spent on the object store and the local cache.
    """

    ref: ArtifactRef
    metrics: dict[str, Any]
    cached: bool
    seconds: float
    storage_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Reads what `to_dict` returned."""
        return cls(**{**content, "ref": ArtifactRef(**content["ref"])})
