"""The pretrained model theta_0, brought from elsewhere."""

from pathlib import Path

from deme_core.digests import sha256_file, spell_infinities
from deme_core.model_folder import load_denoiser, open_model_folder
from deme_core.model_folder_writer import write_like
from deme_core.model_json import content_digest, is_pickled, without_bookkeeping
from deme_core.model_source import fetch_source
from tasks.jobs import ImportJob
from tasks.work.base import Identity, JobContext, Work
from tasks.work.model_description import describe_model


def identity(job: ImportJob, context: JobContext) -> Identity:
    """The content of the model's files, wherever they come from and whatever they say of that."""
    folder = open_model_folder(_fetch(job, context), allow_pickle=job.allow_pickle)
    frozen = folder.frozen_files(allow_pickle=job.allow_pickle)
    # An import of before 2026-11-28 copied them as they were; nothing opens that.
    converted = {"frozen_weights": "safetensors"} if any(map(is_pickled, frozen)) else {}
    return Identity(
        settings={
            folder.index.family.denoiser_part: without_bookkeeping(folder.denoiser_config),
            "noise_scheduler": spell_infinities(without_bookkeeping(folder.scheduler_config)),
            **converted,
        },
        inputs={file.name: sha256_file(file) for file in folder.weights}
        | {file.relative_to(folder.path).as_posix(): content_digest(file) for file in frozen},
    )


def run(job: ImportJob, context: JobContext, out: Path, digest: str) -> Work:
    """Loads the model strictly and writes it as a diffusers folder."""
    yield {"message": f"importing {job.source}"}
    folder = open_model_folder(_fetch(job, context), allow_pickle=job.allow_pickle)
    write_like(out, folder, tensors=load_denoiser(folder).state_dict(), allow_pickle=job.allow_pickle)
    return describe_model(out)


def _fetch(job: ImportJob, context: JobContext) -> Path:
    return fetch_source(job.source, revision=job.revision, cache=context.settings.cache_folder)
