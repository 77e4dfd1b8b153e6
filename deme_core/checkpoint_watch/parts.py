"""Whether the parts of a candidate are there: told from the listing and its JSON files, with no weights read."""

from typing import Any

from deme_core.checkpoint_watch.candidates import DENOISERS, Candidate
from deme_core.errors import ModelFolderError
from deme_core.model_json import INDEX_NAME, PICKLE_NAME, WEIGHTS_NAME, parse_json, shard_names
from deme_core.store import MAX_BYTES_AT_ONCE, ObjectStore

_DIFFUSERS = (WEIGHTS_NAME, PICKLE_NAME)
_TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
_WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor")


class UnfinishedError(Exception):
    """Something is missing that may yet come."""


def model_files(source: ObjectStore, candidate: Candidate) -> list[str]:
    """Returns the names of what the digest of the model takes: its index, its configs, and the denoiser's weights.

    Raises:
        UnfinishedError: one of them, or of the frozen parts, which are not read, is missing and may yet come.
        ModelFolderError: one is missing and will not come, or is pickled or damaged.
    """
    index = _read_json(source, candidate, INDEX_NAME) if INDEX_NAME in candidate.files else {}
    for name, kind in zip(candidate.configs, (DENOISERS, ("scheduler",)), strict=True):
        if name not in candidate.files:
            if index and not any(index.get(part) for part in kind):
                raise ModelFolderError(f"{INDEX_NAME} names no {' or '.join(kind)}; DeMe needs one.")
            raise UnfinishedError(f"{name} is missing")
        _check_size(candidate, name)
    for part, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[0] and part not in (*DENOISERS, "scheduler"):
            _check_frozen_part(source, candidate, part, library=str(value[0]), class_name=str(value[1]))
    weights = _weight_files(source, candidate, candidate.denoiser, _DIFFUSERS)
    return [*([INDEX_NAME] if index else []), *candidate.configs, *weights]


def frozen_parts(candidate: Candidate) -> set[str]:
    """Returns the subfolders of the candidate besides those of denoiser and scheduler."""
    return {name.partition("/")[0] for name in candidate.files if "/" in name} - {*DENOISERS, "scheduler"}


def _check_frozen_part(source: ObjectStore, candidate: Candidate, part: str, *, library: str, class_name: str) -> None:
    if class_name.endswith(_WITHOUT_WEIGHTS):
        if part not in frozen_parts(candidate):
            raise UnfinishedError(f"{part} is missing, which {INDEX_NAME} names")
        return
    if f"{part}/config.json" not in candidate.files:
        raise UnfinishedError(f"{part}/config.json is missing, which {INDEX_NAME} names")
    _weight_files(source, candidate, f"{part}/", _DIFFUSERS if library == "diffusers" else _TRANSFORMERS)


def _weight_files(source: ObjectStore, candidate: Candidate, part: str, names: tuple[str, str]) -> list[str]:
    """Returns the files of a part's weights, in the order in which `deme_core.model_folder` prefers them."""
    weights, pickled = part + names[0], part + names[1]
    index = f"{weights}.index.json"
    if index in candidate.files:
        shards = _shards(source, candidate, part, index)
        if missing := [name for name in shards if name not in candidate.files]:
            raise UnfinishedError(f"{', '.join(missing)} is missing, which {index} names")
        return [index, *shards]
    if weights in candidate.files:
        return [weights]
    if pickled in candidate.files:
        raise ModelFolderError(f"{pickled} is pickled, which can run code; convert it to safetensors.")
    raise UnfinishedError(f"{weights} is missing")


def _shards(source: ObjectStore, candidate: Candidate, part: str, index: str) -> list[str]:
    return [part + name for name in shard_names(_read_json(source, candidate, index), index)]


def _read_json(source: ObjectStore, candidate: Candidate, name: str) -> dict[str, Any]:
    _check_size(candidate, name)
    return parse_json(source.get_bytes(candidate.key(name)), name)


def _check_size(candidate: Candidate, name: str) -> None:
    if (size := candidate.files[name].size) > MAX_BYTES_AT_ONCE:
        raise ModelFolderError(f"{name} holds {size} bytes, which is no config.")
