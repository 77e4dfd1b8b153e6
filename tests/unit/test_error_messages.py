"""Errors that cross from a worker to the flow as JSON."""

import json
import pkgutil
from importlib import import_module

import pytest

import deme_core
from deme_core.errors import (
    BadExpertError,
    DemeError,
    GpuMemoryError,
    IncompatibleCheckpointsError,
    NoAnswerError,
    NonFiniteLossError,
    StoreUnavailableError,
)
from tasks.error_messages import error_message, job_error


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteLossError("segment 2 [500, 750)", 17),
        IncompatibleCheckpointsError("a", reference="b", missing=["c", "d"]),
        StoreUnavailableError("no answer"),
        BadExpertError("worse"),
        NoAnswerError("away"),
        GpuMemoryError("segment 0", "CUDA out of memory", "lower it"),
        DemeError("something"),
    ],
)
def test_an_error_arrives_as_it_left(error: DemeError) -> None:
    arrived = job_error(json.loads(json.dumps(error_message(error))))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.exit_code == error.exit_code


def test_details_arrive() -> None:
    arrived = job_error(json.loads(json.dumps(error_message(NonFiniteLossError("segment 2", 17)))))
    assert isinstance(arrived, NonFiniteLossError)
    assert (arrived.run, arrived.global_step) == ("segment 2", 17)


def test_what_nobody_foresaw_is_named_by_its_class() -> None:
    arrived = job_error(error_message(KeyError("conv_in")))
    assert type(arrived) is DemeError
    assert str(arrived) == "KeyError: 'conv_in'"


def test_a_name_that_is_no_error_class_is_not_looked_up() -> None:
    arrived = job_error({"error": "Any", "message": "x", "attributes": {}})
    assert type(arrived) is DemeError


def test_every_error_of_deme_has_its_class_where_it_is_looked_up() -> None:
    # Whatever lay elsewhere would arrive as another, and a store that is away would not be tried again.
    for module in pkgutil.walk_packages(deme_core.__path__, "deme_core."):
        import_module(module.name)
    assert {kind.__module__ for kind in _children(DemeError)} == {"deme_core.errors"}


def _children(kind: type[DemeError]) -> set[type[DemeError]]:
    return {kind, *(each for child in kind.__subclasses__() for each in _children(child))}
