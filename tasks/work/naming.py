"""Whose images they are that an error is about: the core does not know, and a person wants to."""

from collections.abc import Iterator
from contextlib import contextmanager

from deme_core.errors import NonFiniteImagesError


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Says whose images they are that turn out to be NaN or infinite."""
    try:
        yield
    except NonFiniteImagesError as error:
        raise NonFiniteImagesError(f"{what}: {error}") from error
