"""Jobs that confine, search, score as candidates, and merge copies."""

from typing import ClassVar

from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, EvaluateSpec, MethodSpec, RegMeanSpec, SearchSpec
from tasks.jobs.base import IMAGES_MEND, Job


class GramsJob(Job):
    """Measure which inputs the linear maps of a finetuned copy see on its own segment [low, high)."""

    stage: ClassVar[str] = "grams"
    work: ClassVar[str] = "grams"
    version: ClassVar[int] = 2
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


class SearchJob(Job):
    """Describe a search for the weights whose merge scores best on the search's own seeds and real images.

    The search itself is driven by `tasks.weight_search` and becomes an artifact of the stage ``weights``.

    Attributes:
        segment_edges: 0, inner edges, T of all segments.
        is_control: the only expert is the control, whose scale is searched.
    """

    stage: ClassVar[str] = "problem"
    work: ClassVar[str] = "search"
    version: ClassVar[int] = 7
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
        weights: as `deme_core.merge_methods.build.build_method` takes them.
    """

    stage: ClassVar[str] = "search"
    keeps_live_merge: ClassVar[bool] = True
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
    memory_mend: ClassVar[str] = IMAGES_MEND
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


class MergeJob(Job):
    """Merge experts into theta_0; with one expert, scale its task vector.

    Attributes:
        weights: as `deme_core.merge_methods.build.build_method` takes them.
    """

    stage: ClassVar[str] = "merged"
    work: ClassVar[str] = "merge"
    pretrained: ArtifactRef
    experts: tuple[ArtifactRef, ...]
    method: MethodSpec
    weights: tuple[float, ...]
