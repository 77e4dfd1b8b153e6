"""The JSON files of model folders."""

import json
from pathlib import Path
from typing import Any

from deme_core.errors import ModelFolderError

INDEX_NAME = "model_index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of a model folder.

    Raises:
        ModelFolderError: it is missing, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing; a model folder needs it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} does not hold a JSON object.")
    return content
