"""Jobs: the work of each stage as plain data, which a worker process can be sent.

How a job is done is in the module of `tasks.work` that it names; only workers import that, since it needs torch.
"""

from tasks.jobs.base import Job, JobResult
from tasks.jobs.measuring import (
    EvaluateJob,
    GeneratedFeaturesJob,
    GeneratedImages,
    HeldoutJob,
    RealFeaturesJob,
    ReferenceJob,
)
from tasks.jobs.merging import CandidateJob, ConfineJob, GramsJob, LossJob, MergeJob, ScoreJob, SearchJob
from tasks.jobs.training import (
    CHECKPOINTS,
    PRETRAINED_STAGE,
    CheckJob,
    Demands,
    DistillJob,
    EmbeddingsJob,
    FinetuneJob,
    ImportCopyJob,
    ImportJob,
    LatentsJob,
    PretrainJob,
    pretrained_job,
)

__all__ = [
    "CHECKPOINTS",
    "JOBS",
    "PRETRAINED_STAGE",
    "CandidateJob",
    "CheckJob",
    "ConfineJob",
    "Demands",
    "DistillJob",
    "EmbeddingsJob",
    "EvaluateJob",
    "FinetuneJob",
    "GeneratedFeaturesJob",
    "GeneratedImages",
    "GramsJob",
    "HeldoutJob",
    "ImportCopyJob",
    "ImportJob",
    "Job",
    "JobResult",
    "LatentsJob",
    "LossJob",
    "MergeJob",
    "PretrainJob",
    "RealFeaturesJob",
    "ReferenceJob",
    "ScoreJob",
    "SearchJob",
    "pretrained_job",
]

_TRAINING = (PretrainJob, ImportJob, CheckJob, LatentsJob, EmbeddingsJob, FinetuneJob, ImportCopyJob, DistillJob)
_MERGING = (GramsJob, ConfineJob, SearchJob, ScoreJob, LossJob, MergeJob)
_MEASURING = (RealFeaturesJob, ReferenceJob, HeldoutJob, GeneratedFeaturesJob, EvaluateJob)
JOBS: dict[str, type[Job]] = {job.__name__: job for job in (*_TRAINING, *_MERGING, *_MEASURING)}
