"""The files of model folders by name, and their JSON."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deme_core.digests import sha256_bytes, sha256_file
from deme_core.errors import ModelFolderError

# The index of a model of some thousand shards takes a megabyte.
_MAX_BYTES = 16 * 2**20
INDEX_NAME = "model_index.json"
WEIGHTS_NAME, PICKLE_NAME = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
PICKLE_SUFFIX = ".bin"
# What `save_pretrained` writes with a variant; others, as non_ema, are other weights.
PRECISIONS = ("fp16", "bf16")
_PRECISION = re.compile(rf"\.({'|'.join(PRECISIONS)})(?=[.-])")
# Where a model was loaded from, as `save_pretrained` notes it. Versions of libraries stay in digests, which had them
# of every model from the beginning.
_BOOKKEEPING = ("_name_or_path", "name_or_path", "_commit_hash", "is_local", "local_files_only")
# What a model folder is read from; anything else beside it is none of it.
SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors", ".bin")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of a model folder.

    Raises:
        ModelFolderError: it is missing, too large, is not JSON, or holds something else.
    """
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ModelFolderError(f"{path} holds {size} bytes, which is no config.")
        text = path.read_bytes()
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing; a model folder needs it.") from None
    return parse_json(text, str(path))


def parse_json(text: bytes, path: str) -> dict[str, Any]:
    """Returns the JSON object in the text of a file that messages call ``path``.

    Raises:
        ModelFolderError: it is not JSON, or holds something else.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # Numbers of thousands of digits and a thousand brackets, too.
        raise ModelFolderError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} does not hold a JSON object.")
    return content


def without_bookkeeping(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a config says of its model, without where that was loaded from."""
    return {name: value for name, value in config.items() if name not in _BOOKKEEPING}


def content_digest(file: Path) -> str:
    """Returns the sha256 of a file of a model folder; of a config, as it would be `without_bookkeeping`.

    Raises:
        ModelFolderError: a config is damaged.
    """
    if file.name == INDEX_NAME or file.name.endswith("config.json"):
        config = read_json(file)
        if len(kept := without_bookkeeping(config)) < len(config):
            # As the library wrote it, of which some escape what is not ASCII: a folder that never held such a key has
            # the same digest.
            is_ascii = file.read_bytes().isascii()
            text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=is_ascii)
            return sha256_bytes(f"{text}\n".encode(errors="surrogatepass"))
    return sha256_file(file)


def shard_names(index: dict[str, Any], path: str, *, suffix: str = ".safetensors") -> list[str]:
    """Returns the files that the index of sharded weights names, which lie beside it.

    Raises:
        ModelFolderError: it names none, one that lies elsewhere, or one of another kind than ``suffix`` says.
    """
    weight_map = index.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and is_plain_name(name) for name in names):
        raise ModelFolderError(f"{path} has no weight_map, which names the files of the weights beside it.")
    if others := [name for name in names if not name.endswith(suffix)]:
        # Libraries read a file of any other name as pickled.
        raise ModelFolderError(f"{path} names {others[0]!r} in its weight_map, which is no {suffix} file.")
    return sorted(set(names))


def safetensors_name(name: str) -> str:
    """Returns what the libraries call the safetensors file, or the index, that stands for one of pickled weights."""
    stem = name if name.startswith("diffusion_") else name.replace("pytorch_model", "model", 1)
    return stem.replace(PICKLE_SUFFIX, ".safetensors")


def variant_of(name: str) -> str | None:
    """Returns the precision that the name of a file of weights, or of the index of such, tells; None if none."""
    found = _PRECISION.search(name)
    return found and found[1]


def plain_name(name: str) -> str:
    """Returns what a file of weights of some precision is called in a folder without variants."""
    return _PRECISION.sub("", name)


def is_pickled(file: Path) -> bool:
    """Whether a file of those that `needed_files` leaves is pickled weights, or the index of such."""
    if not file.name.endswith(f"{PICKLE_SUFFIX}.index.json"):
        return file.suffix == PICKLE_SUFFIX
    index = file.with_name(safetensors_name(file.name))
    return not index.is_file() and not index.with_suffix("").with_suffix("").is_file()


def check_part(folder: Path) -> None:
    """Checks that the libraries which load a frozen part take its weights from safetensors files in its folder alone.

    Raises:
        ModelFolderError: an index of shards names other files, or a config another model or other weights.
    """
    for suffix in (".safetensors", PICKLE_SUFFIX):
        for index in folder.rglob(f"*{suffix}.*index*.json"):
            plain = index.with_name(plain_name(index.name))
            if plain != index and (plain.is_file() or plain.with_suffix("").with_suffix("").is_file()):
                continue  # Nobody reads it beside plain weights.
            shard_names(read_json(index), str(index), suffix=suffix)
    for name in (INDEX_NAME, "adapter_config.json"):
        if (file := next(folder.rglob(name), None)) is not None:
            raise ModelFolderError(f"{file} makes {folder.name} more than one model, which DeMe does not load.")
    if (config := folder / "config.json").is_file() and "transformers_weights" in read_json(config):
        raise ModelFolderError(
            f"{config} names the file of its weights (transformers_weights), which DeMe does not read."
        )


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file or folder right where it is looked for."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\\0")
