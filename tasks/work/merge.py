"""The merge: N copies become one stock model."""

from pathlib import Path

import torch

from deme_core.merge import merge_checkpoints
from deme_core.merge_methods.build import build_method
from deme_core.model_digest import tensors_digest
from deme_core.model_folder import open_model_folder
from deme_core.model_folder_writer import write_like
from deme_core.recipe import MethodSpec
from tasks.jobs import MergeJob
from tasks.work.base import Identity, JobContext, Work


def identity(job: MergeJob, context: JobContext) -> Identity:
    """Weights and models."""
    inputs = {"pretrained": job.pretrained.digest}
    inputs |= {f"expert-{index}": expert.digest for index, expert in enumerate(job.experts)}
    return Identity(settings=job.method.settings() | {"weights": list(job.weights)}, inputs=inputs)


def run(job: MergeJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the merged model as a folder that stock diffusers loads."""
    yield {"message": "merging"}
    experts = [context.fetch(expert) for expert in job.experts]
    merge_folders(context.fetch(job.pretrained), experts, job.method, job.weights, out)
    tensors = open_model_folder(out).checkpoint().tensors()
    return {"weights": list(job.weights), "weights_digest": tensors_digest(tensors)}


def merge_folders(
    pretrained: Path,
    experts: list[Path],
    spec: MethodSpec,
    weights: tuple[float, ...],
    out: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Merges model folders into the folder ``out``; for ``dtype`` see `merge_checkpoints`.

    Raises:
        InputError: there are not as many weights as experts, or one is not finite.
        IncompatibleCheckpointsError: the tensors do not match.
        ModelFolderError: an expert is a LoRA of another pretrained model.
    """
    base = open_model_folder(pretrained)
    checkpoints = {
        f"expert {index} ({path})": open_model_folder(path).expert(base) for index, path in enumerate(experts)
    }
    destination = write_like(out, base)
    method = build_method(spec, weights, len(experts), base.checkpoint().infos)
    merge_checkpoints(base.checkpoint(), checkpoints, method, destination, dtype=dtype)
