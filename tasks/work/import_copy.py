"""A copy of theta_0 that was finetuned elsewhere, brought into the store as one that was finetuned here."""

from pathlib import Path

from deme_core.digests import sha256_file
from deme_core.model_folder import ModelFolder, check_copy, load_denoiser, open_model_folder
from deme_core.model_folder_writer import write_like
from deme_core.model_source import fetch_source
from tasks.jobs import ImportCopyJob
from tasks.work.base import Identity, JobContext, Work


def identity(job: ImportCopyJob, context: JobContext) -> Identity:
    """The content of the copy's weights, and whose copy it is."""
    weights = {file.name: sha256_file(file) for file in _open(job, context).weights}
    return Identity(settings={"from": "elsewhere"}, inputs={"pretrained": job.pretrained.digest, **weights})


def run(job: ImportCopyJob, context: JobContext, out: Path, digest: str) -> Work:
    """Writes the denoiser alone: all else is the pretrained model's."""
    yield {"message": f"importing {job.source}"}
    folder, pretrained = _open(job, context), context.open_model(job.pretrained)
    check_copy(folder, pretrained)
    write_like(out, pretrained, tensors=load_denoiser(folder).state_dict(), copy_of=job.pretrained.digest)
    return {"history": []}


def _open(job: ImportCopyJob, context: JobContext) -> ModelFolder:
    path = fetch_source(job.source, revision=None, cache=context.settings.cache_folder)
    return open_model_folder(path, allow_pickle=job.allow_pickle)
