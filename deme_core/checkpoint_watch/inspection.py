"""Whether a candidate holds a whole model, and which: its files are read here, and nowhere else in the watch."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from deme_core.checkpoint_watch.candidates import MODEL_INDEX, Candidate
from deme_core.errors import ArtifactNotFoundError, ModelFolderError
from deme_core.store import ObjectStore, local_errors

# As in `deme_core.model_folder`, which imports torch.
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_PICKLE_NAME = "diffusion_pytorch_model.bin"

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


class _UnfinishedError(Exception):
    """Something is missing that may yet come."""


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
        names = _files_of_model(source, candidate)
        with local_errors(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
            temporary = TemporaryDirectory(dir=scratch)
        with temporary as local:
            for name in names:
                source.get_file(_key(candidate, name), Path(local, name))
            _check_unchanged(source, candidate)
            return Verdict("whole", digest=_weights_digest(Path(local)))
    except _UnfinishedError as error:
        return Verdict("waiting", str(error))
    except ArtifactNotFoundError:
        return Verdict("waiting", "a file went away while it was read")
    except ModelFolderError as error:
        return Verdict("broken", str(error))


def _files_of_model(source: ObjectStore, candidate: Candidate) -> list[str]:
    """Returns the names of configs and weights, in the order in which `deme_core.model_folder` prefers them."""
    for name in candidate.configs:
        if name not in candidate.files:
            _check_is_to_come(source, candidate, name)
            raise _UnfinishedError(f"{name} is missing")
    weights, pickled = candidate.unet + WEIGHTS_NAME, candidate.unet + _PICKLE_NAME
    index = f"{weights}.index.json"
    if index in candidate.files:
        shards = _shards(source, candidate, index)
        if missing := [name for name in shards if name not in candidate.files]:
            raise _UnfinishedError(f"{', '.join(missing)} is missing, which {index} names")
        return [*candidate.configs, index, *shards]
    if weights in candidate.files:
        return [*candidate.configs, weights]
    if pickled in candidate.files:
        raise ModelFolderError(f"{pickled} is pickled, which can run code; convert it to safetensors.")
    raise _UnfinishedError(f"{weights} is missing")


def _check_is_to_come(source: ObjectStore, candidate: Candidate, name: str) -> None:
    """Raises ModelFolderError if the pipeline has no such part at all, as those of transformers have no unet."""
    part = "unet" if name == candidate.configs[0] else "scheduler"
    if MODEL_INDEX in candidate.files and not _read_json(source, candidate, MODEL_INDEX).get(part):
        raise ModelFolderError(f"{MODEL_INDEX} names no {part}; DeMe needs both a unet and a scheduler.")


def _shards(source: ObjectStore, candidate: Candidate, index: str) -> list[str]:
    weight_map = _read_json(source, candidate, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise ModelFolderError(f"{index} has no weight_map, which names the files of the weights.")
    return sorted({candidate.unet + name for name in weight_map.values()})


def _read_json(source: ObjectStore, candidate: Candidate, name: str) -> dict[str, Any]:
    try:
        content = json.loads(source.get_bytes(_key(candidate, name)))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{name} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{name} does not hold a JSON object.")
    return content


def _check_unchanged(source: ObjectStore, candidate: Candidate) -> None:
    listed = {found.key: found for found in source.list(_key(candidate, ""))}
    if any(listed.get(file.key) != file for file in candidate.files.values()):
        raise _UnfinishedError("it changed while it was read")


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


def _key(candidate: Candidate, name: str) -> str:
    return f"{candidate.folder}/{name}" if candidate.folder else name
