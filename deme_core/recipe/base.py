"""What all sections of a recipe have in common."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["fp32", "bf16", "fp16"]


class Spec(BaseModel):
    """Frozen; knows all its keys; holds no number that JSON cannot."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
