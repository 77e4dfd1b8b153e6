"""What all jobs have in common."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from deme_core.manifest import ArtifactRef

# Of jobs that generate images, which are the same in batches of any size.
IMAGES_MEND = "lower evaluate.batch_size"


class Job(BaseModel):
    """The work of one stage.

    Attributes:
        stage: first part of the artifact's key.
        work: module of `tasks.work` that does the job.
        version: part of the digest; raised when the work starts to give another result.
        can_wait: whether nothing but the report needs it, so that all other jobs go first.
        memory_mend: what to do where a GPU has too little memory.
        leaves_checkpoints: whether the work can be resumed, and so leaves checkpoints in the store until it is done.
        keeps_live_merge: whether the models of a search's candidates stay in memory meanwhile.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: ClassVar[str]
    work: ClassVar[str]
    version: ClassVar[int] = 1
    can_wait: ClassVar[bool] = False
    memory_mend: ClassVar[str] = "use one with more"
    leaves_checkpoints: ClassVar[bool] = False
    keeps_live_merge: ClassVar[bool] = False

    @property
    def display_name(self) -> str:
        """What messages call it: its label if it has one, else its stage."""
        return str(getattr(self, "label", self.stage))

    @property
    def num_generated_images(self) -> int:
        """How many images the work generates."""
        return 0

    @property
    def num_processes(self) -> int:
        """How many processes do it together, on a GPU each where there are any."""
        return 1


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
