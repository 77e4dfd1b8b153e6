import inspect
import pickle

import pytest

from deme_core import errors
from deme_core.errors import DemeError, IncompatibleCheckpointsError, InputError, NonFiniteLossError

ALL = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, DemeError)]


@pytest.mark.parametrize("error_class", ALL)
def test_the_users_errors_leave_with_2_and_the_runs_with_1(error_class: type[DemeError]) -> None:
    assert error_class.exit_code == (2 if issubclass(error_class, ValueError) else 1)
    assert issubclass(error_class, InputError) == issubclass(error_class, ValueError)


def test_incompatible_checkpoints_are_described_by_what_differs_only() -> None:
    error = IncompatibleCheckpointsError("expert 1", reference="its config", extra=["b", "a"])
    assert str(error) == "expert 1 does not hold the tensors of its config; extra tensors: b, a."
    assert (error.missing, error.extra, error.mismatched) == ((), ("b", "a"), ())


def test_a_non_finite_loss_names_run_step_and_mend() -> None:
    error = NonFiniteLossError("segment 2 [500, 750)", 17)
    assert (error.run, error.global_step) == ("segment 2 [500, 750)", 17)
    assert "segment 2 [500, 750), or its gradient, is not finite at step 17; lower finetune.learning_rate" in str(error)


@pytest.mark.parametrize(
    "error", [NonFiniteLossError("segment 2", 17), IncompatibleCheckpointsError("a", reference="b", missing=["c"])]
)
def test_errors_cross_processes(error: DemeError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))
