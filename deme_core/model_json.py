"""The files of model folders by name, and their JSON."""

import json
from pathlib import Path
from typing import Any

from deme_core.errors import ModelFolderError

# The index of a model of some thousand shards takes a megabyte.
_MAX_BYTES = 16 * 2**20
INDEX_NAME = "model_index.json"
WEIGHTS_NAME, PICKLE_NAME = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
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


def shard_names(index: dict[str, Any], path: str) -> list[str]:
    """Returns the files that the index of sharded weights names, which lie beside it.

    Raises:
        ModelFolderError: it names none, or one that lies elsewhere.
    """
    weight_map = index.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and is_plain_name(name) for name in names):
        raise ModelFolderError(f"{path} has no weight_map, which names the files of the weights beside it.")
    return sorted(set(names))


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file or folder right where it is looked for."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\\0")
