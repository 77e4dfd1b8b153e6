"""Types of flow parameters: what the Prefect UI checks before a run starts."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated

from prefect.runtime import flow_run
from pydantic import Field, StringConstraints

RecipeName = Annotated[
    str, Field(min_length=1, description="Name of a recipe, or path or object-store URI of a YAML file.")
]
Override = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*=[\s\S]*$")]
Overrides = Annotated[Sequence[Override], Field(description="Settings such as finetune.num_steps=50.")]


def recipe_name() -> str:
    """Returns the name of a flow run: the recipe's, without folder and suffix."""
    return PurePosixPath(flow_run.parameters["recipe"]).stem
