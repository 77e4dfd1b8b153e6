"""When the jobs of a flow run ran, and what each stage of it cost."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from deme_core.html_report.content import StageCost
from tasks.jobs import Job, JobResult

# What people call the stages.
LABELS = {
    "pretrained": "pretrained model",
    "checked": "look at what the model can do",
    "latents": "encoded images",
    "embeddings": "encoded captions",
    "finetune": "finetuning",
    "features": "images and their features",
    "reference": "statistics of the real images",
    "heldout": "held-out loss",
    "problem": "description of the searches",
    "search": "candidates of the searches",
    "grams": "what the layers of the copies see",
    "confined": "confined copies",
    "merged": "merging",
    "distilled": "distillation",
    "evaluate": "scoring",
}


@dataclass(frozen=True)
class Span:
    """One job that ended well.

    Attributes:
        stage: of its artifact.
        began: seconds since the flow run began.
        ended: the same.
        cached: whether the store had the result.
        num_images: images generated.
    """

    stage: str
    began: float
    ended: float
    cached: bool
    num_images: int


@dataclass
class Timing:
    """What ran when, in seconds since the flow run began."""

    started: float = field(default_factory=time.perf_counter)
    spans: list[Span] = field(default_factory=list)
    storage: float = 0.0

    def add(self, job: Job, began: float, result: JobResult) -> None:
        """Notes that ``job`` ran from ``began`` (perf_counter) till now."""
        num_images = 0 if result.cached else job.num_generated_images
        now = time.perf_counter()
        self.spans.append(Span(job.stage, began - self.started, now - self.started, result.cached, num_images))
        self.storage += result.storage_seconds

    def seconds(self) -> dict[str, float]:
        """Returns wall time by stage, ``total``, and what was lost: ``idle`` (no job ran) and ``storage``.

        Stages that run side by side both count their whole time. ``storage`` is spent inside of jobs.
        """
        stages = {cost.stage: cost.wall_seconds for cost in self.costs()}
        total = time.perf_counter() - self.started
        idle = total - _covered(self.spans)
        return {k: round(v, 2) for k, v in {**stages, "storage": self.storage, "idle": idle, "total": total}.items()}

    def costs(self) -> tuple[StageCost, ...]:
        """Returns what each stage cost, in the order in which the stages first ended a job."""
        spans = tuple(self.spans)  # Other threads add to it.
        return tuple(
            _cost(stage, [span for span in spans if span.stage == stage])
            for stage in dict.fromkeys(span.stage for span in spans)
        )


def _cost(stage: str, spans: list[Span]) -> StageCost:
    return StageCost(
        stage=stage,
        label=LABELS.get(stage, stage),
        num_jobs=len(spans),
        num_cached=sum(span.cached for span in spans),
        wall_seconds=_covered(spans),
        worker_seconds=sum(span.ended - span.began for span in spans),
        num_images=sum(span.num_images for span in spans),
    )


def _covered(spans: Iterable[Span]) -> float:
    """Returns the length of the union of the spans."""
    covered, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.began):
        covered += max(span.ended - max(span.began, reached), 0.0)
        reached = max(reached, span.ended)
    return covered
