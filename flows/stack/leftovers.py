"""What a killed Prefect worker leaves in the folder for temporary files."""

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from flows.stack.processes import STACK_VARIABLE


def remove_workspaces(stack: str) -> None:
    """Removes the folders of flow runs that were started by a stack whose worker does not run.

    Prefect's worker writes the environment of each flow run there, with all keys, and removes it when the run ends.
    """
    for folder in Path(tempfile.gettempdir()).glob("prefect-workspace-attempt-*"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads((folder / "workspace.json").read_bytes())["environment"][STACK_VARIABLE] == stack:
                shutil.rmtree(folder)
