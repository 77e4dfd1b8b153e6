"""Whether a candidate holds a whole model, and which: its files are read here, and nowhere else in the watch."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deme_core.checkpoint_watch.candidates import Candidate
from deme_core.checkpoint_watch.parts import UnfinishedError, frozen_parts, model_files
from deme_core.errors import ArtifactNotFoundError, ChecksumMismatchError, ModelFolderError, ObjectTooLargeError
from deme_core.scratch_folder import scratch_folder
from deme_core.store import ObjectStore

Outcome = Literal["waiting", "whole", "broken"]


@dataclass(frozen=True)
class Verdict:
    """What a look at a folder found.

    Attributes:
        outcome: waiting: still being uploaded; whole: a model; broken: no model, and not going to be one.
        reason: why it waits or is broken, as the end of a sentence.
        digest: of the weights, if whole.
    """

    outcome: Outcome
    reason: str | None = None
    digest: str | None = None


def inspect(source: ObjectStore, candidate: Candidate, scratch: Path) -> Verdict:
    """Downloads what makes up the model, if all of it is there, and digests its weights.

    Args:
        source: the store that was listed.
        candidate: one of its folders.
        scratch: the download goes into a temporary folder in it.

    Raises:
        StoreUnavailableError: the store, or the disk under ``scratch``, cannot be used.
    """
    try:
        names = model_files(source, candidate)
        with scratch_folder(scratch) as local:
            _check_space(local, sum(candidate.files[name].size for name in names))
            for name in names:
                source.get_file(candidate.key(name), local / name, max_bytes=candidate.files[name].size)
            for part in frozen_parts(candidate):
                (local / part).mkdir()
            _check_unchanged(source, candidate)
            return Verdict("whole", digest=_weights_digest(local))
    except UnfinishedError as error:
        return Verdict("waiting", str(error))
    except (ArtifactNotFoundError, ObjectTooLargeError):
        return Verdict("waiting", "a file went away or grew while it was read")
    except ChecksumMismatchError:  # It may have been damaged on its way.
        return Verdict("waiting", "a file is not what its checksum says")
    except ModelFolderError as error:
        return Verdict("broken", str(error))


def _check_space(folder: Path, num_bytes: int) -> None:
    """Makes a model that is too large wait alone: others than this machine's user fill the prefix."""
    if num_bytes > (free := shutil.disk_usage(folder).free):
        raise UnfinishedError(f"it takes {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free under DEME_HOME")


def _check_unchanged(source: ObjectStore, candidate: Candidate) -> None:
    listed = {found.key: found for found in source.list(candidate.key(""))}
    if any(listed.get(file.key) != file for file in candidate.files.values()):
        raise UnfinishedError("it changed while it was read")


def _weights_digest(path: Path) -> str:
    """Returns the digest that the import stage gives these weights.

    Raises:
        ModelFolderError: a config describes no model, or the weights are damaged or not those of the config; its
            message names files by their path within the folder.
    """
    from deme_core.model_digest import model_digest
    from deme_core.model_folder import build_denoiser, load_denoiser, open_model_folder

    try:
        folder = open_model_folder(path)
        try:
            assert folder.num_train_timesteps > 0
            build_denoiser(folder.denoiser_config, materialize=False)
        except Exception as error:  # diffusers raises errors of any kind for values that it cannot use
            raise ModelFolderError(f"Its configs describe no model ({type(error).__name__}: {error}).") from error
        return model_digest(load_denoiser(folder))
    except ModelFolderError as error:
        message = str(error).replace(f"{path}/", "").replace(str(path), "it")
        raise ModelFolderError(" ".join(message.split())) from error
