"""Jobs that bring, encode for, train and distill models."""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, DistillSpec, EvaluateSpec, FinetuneSpec, Recipe, TrainingSpec
from tasks.jobs.base import Job

PRETRAINED_STAGE = "pretrained"
CHECKPOINTS = "checkpoints"  # Below it a stage for each training.


def _less_memory(section: str) -> str:
    return (
        f"lower {section}.batch_size, and raise gradient_accumulation_steps by as much, or set gradient_checkpointing "
        "where there is one"
    )


class Demands(BaseModel):
    """What a recipe asks of its model, of all that a config tells whether it can be had.

    Attributes:
        samplings: how images are made.
        min_snr_gammas: by which trainings weigh their losses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samplings: tuple[EvaluateSpec, ...]
    min_snr_gammas: tuple[float, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Returns what a recipe asks for."""
        gammas = (recipe.finetune.for_copies().min_snr_gamma, recipe.finetune.for_control(1).min_snr_gamma)
        return cls(samplings=recipe.samplings, min_snr_gammas=tuple(gamma for gamma in gammas if gamma is not None))


class CheckJob(Job):
    """See whether a model can do what a recipe asks, before that is found out by failing after days.

    The word that all is well stays in the store: whoever has `Sampling.build_scheduler` refuse more raises the version.
    """

    stage: ClassVar[str] = "checked"
    work: ClassVar[str] = "check"
    pretrained: ArtifactRef
    demands: Demands


class PretrainJob(Job):
    """Train theta_0 from scratch on the data set, whose image size and channels it takes.

    Attributes:
        text_encoder: T5 config of a model that takes text; None for one that takes none.
        demands: what it will have to do, which is looked at before it is trained; no part of the result.
    """

    stage: ClassVar[str] = PRETRAINED_STAGE
    work: ClassVar[str] = "pretrain"
    leaves_checkpoints: ClassVar[bool] = True
    memory_mend: ClassVar[str] = _less_memory("pretrained.training")
    dataset: DatasetSpec
    unet: dict[str, Any]
    noise_scheduler: dict[str, Any]
    training: TrainingSpec
    text_encoder: dict[str, Any] | None = None
    demands: Demands | None = None

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


def pretrained_job(recipe: Recipe) -> PretrainJob | ImportJob:
    """Returns the job whose artifact is theta_0."""
    source = recipe.pretrained
    if source.source != "pretrain":
        return ImportJob(source=source.source, revision=source.revision, allow_pickle=source.allow_pickle)
    assert source.training is not None
    return PretrainJob(
        dataset=recipe.dataset,
        unet=source.unet,
        noise_scheduler=source.noise_scheduler,
        training=source.training,
        text_encoder=source.text_encoder,
        demands=Demands.of(recipe),
    )


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
    memory_mend: ClassVar[str] = _less_memory("finetune")
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


class ImportCopyJob(Job):
    """Bring a copy of theta_0 that was finetuned elsewhere into the store, checked, as safetensors.

    Attributes:
        label: name for messages; no part of the result.
        pretrained: theta_0.
        source: a diffusers folder, an object-store URI, or a hub id.
        allow_pickle: accept pickled weights.
    """

    stage: ClassVar[str] = "finetune"
    work: ClassVar[str] = "import_copy"
    label: str
    pretrained: ArtifactRef
    source: str
    allow_pickle: bool = False


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
    memory_mend: ClassVar[str] = _less_memory("distill")
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
