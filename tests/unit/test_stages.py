"""The Prefect tasks of stages: what they try again."""

import pytest
from prefect.states import Completed, Failed

from deme_core.errors import DemeError, InputError, NoAnswerError, StoreUnavailableError, WorkerDiedError
from tasks.stages import _is_passing, _is_store_away


@pytest.mark.parametrize(
    ("error", "is_passing", "is_store_away"),
    [
        (StoreUnavailableError("away"), True, True),
        (NoAnswerError("silent"), True, True),
        (WorkerDiedError("killed"), True, False),
        (InputError("a wrong recipe"), False, False),
        (DemeError("a wrong state"), False, False),
        (ValueError("a mistake of ours"), False, False),
        (KeyError("another one"), False, False),
    ],
    ids=repr,
)
def test_only_what_may_pass_by_itself_is_tried_again(error: Exception, is_passing: bool, is_store_away: bool) -> None:
    state = Failed(data=error)
    assert (_is_passing(None, None, state), _is_store_away(None, None, state)) == (is_passing, is_store_away)


def test_what_succeeded_is_not_tried_again() -> None:
    assert not _is_passing(None, None, Completed(data=1))
