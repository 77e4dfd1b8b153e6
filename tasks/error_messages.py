"""Errors as plain data, so that what a job raised in another process is raised again where its result is awaited."""

from typing import Any

from deme_core import errors
from deme_core.errors import DemeError


def error_message(error: Exception) -> dict[str, Any]:
    """Returns class, text and plain attributes of an error."""
    attributes = {k: v for k, v in vars(error).items() if isinstance(v, str | int | float | tuple | list)}
    return {"error": type(error).__name__, "message": str(error), "attributes": attributes}


def job_error(message: dict[str, Any]) -> DemeError:
    """Returns the error of a message: of its own class where DeMe foresaw it, otherwise a DemeError."""
    error_class = getattr(errors, message["error"], None)
    if not (isinstance(error_class, type) and issubclass(error_class, DemeError)):
        return DemeError(f"{message['error']}: {message['message']}")
    error = error_class.__new__(error_class)
    Exception.__init__(error, message["message"])
    vars(error).update(message["attributes"])
    return error
