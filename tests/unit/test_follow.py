"""Which run `deme follow` follows."""

from types import SimpleNamespace
from typing import Any

import pytest

from deme_core.errors import InputError
from flows.follow import _find


def flow_run(name: str, *, scheduled: bool, auto_scheduled: bool) -> Any:
    state = SimpleNamespace(is_scheduled=lambda: scheduled)
    return SimpleNamespace(id=name, state=state, auto_scheduled=auto_scheduled)


def test_a_run_that_a_schedule_has_in_store_is_followed_only_by_its_name() -> None:
    tonight = flow_run("tonight", scheduled=True, auto_scheduled=True)
    mine = flow_run("mine", scheduled=True, auto_scheduled=False)
    last_night = flow_run("last night", scheduled=False, auto_scheduled=True)

    def found(*runs: Any, name: str | None = None) -> Any:
        client: Any = SimpleNamespace(read_flow_runs=lambda **_: list(runs), api_url="here")
        return _find(client, name)

    assert found(tonight, mine, last_night) is mine
    assert found(tonight, last_night) is last_night
    assert found(tonight, mine, name="ton") is tonight
    with pytest.raises(InputError, match="There is no run of the flow deme yet"):
        found(tonight)
