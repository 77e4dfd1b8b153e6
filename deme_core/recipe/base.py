"""What all sections of a recipe have in common."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["fp32", "bf16", "fp16"]
# The config of a class of diffusers or transformers.
JsonMapping = dict[str, JsonValue]

# What stands before a host, and what follows a question mark; which in a store's key is a sign like others.
_SECRET = re.compile(r"://[^/\s]*@|^s3://[^/]*:|^(?!s3:|file:|hf:)[a-z][a-z0-9+.-]*://\S*[@?]", re.IGNORECASE)


class Spec(BaseModel):
    """Frozen; knows all its keys; holds no number that JSON cannot, and no text that must not be shown."""

    # An input that is refused may be an address with a password.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="after")
    def _texts_can_be_shown(self) -> Self:
        """Recipes go to MLflow and onto pages: a password is refused, and not repeated, before it gets there."""
        for name in type(self).model_fields:
            for text in _texts(getattr(self, name)):
                if _SECRET.search(text):
                    raise ValueError(
                        f"{name} is an address with a password or a query, which everybody would see who sees the "
                        "recipe; leave them out"
                    )
                if "\0" in text or not _is_unicode(text):
                    raise ValueError(f"{name} holds a character that no text, name or path has")
        return self


def _texts(value: Any) -> Iterator[str]:
    """All texts of a field; a section below it has looked at its own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *_texts(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _is_unicode(text: str) -> bool:
    """Whether it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
