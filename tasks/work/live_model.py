"""The live merge of a worker: theta_0 and the experts stay in memory between the candidates of a search."""

from typing import Any

from deme_core.live_merge import LiveMerge
from deme_core.merge_methods.build import build_method
from deme_core.model_folder import ModelFolder, load_denoiser, open_model_folder
from tasks.jobs import CandidateJob
from tasks.work.base import LIVE_MERGE, JobContext

# A flow run searches the merge weights and the control's scale side by side: with one, each batch would reload.
_NUM_KEPT = 2


def live_merge(job: CandidateJob, context: JobContext) -> tuple[ModelFolder, LiveMerge]:
    """Returns the merge that ``job`` describes as a live model, and theta_0's folder."""
    key = " ".join(ref.uri for ref in (job.pretrained, *job.experts))
    folder, merge = context.remember_latest(LIVE_MERGE, key, lambda: _load(job, context), num_kept=_NUM_KEPT)
    merge.apply(build_method(job.method, job.weights, len(job.experts), merge.names))
    return folder, merge


def _load(job: CandidateJob, context: JobContext) -> tuple[ModelFolder, LiveMerge]:
    folder = context.open_model(job.pretrained)
    experts = [open_model_folder(context.fetch(expert)).expert(folder) for expert in job.experts]
    return folder, LiveMerge(load_denoiser(folder).eval().to(context.device), experts)


def merge_inputs(job: CandidateJob) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the digests and the settings that decide which model a candidate is.

    Task arithmetic leaves copies of weight zero out: all w = 0 is theta_0, in whichever search it occurs.
    """
    experts, weights = job.experts, job.weights
    if job.method.method == "task_arithmetic":
        experts = tuple(expert for expert, weight in zip(experts, weights, strict=True) if weight != 0.0)
        weights = tuple(weight for weight in weights if weight != 0.0)
    inputs = {f"expert-{index}": expert.digest for index, expert in enumerate(experts)}
    settings = {"merge": job.method.settings(), "weights": list(weights)}
    return {"pretrained": job.pretrained.digest} | inputs, settings
