"""Types of flow parameters: what the Prefect UI checks before a run starts."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, StringConstraints

RecipeName = Annotated[
    str, Field(min_length=1, description="Name of a recipe, or path or object-store URI of a YAML file.")
]
Override = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*=[\s\S]*$")]
Overrides = Annotated[Sequence[Override], Field(description="Settings such as finetune.num_steps=50.")]
