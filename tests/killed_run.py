"""A process that ends at once, as a killed one does, while its run is live: here, so that it imports little."""

import os
from functools import partial

from deme_core.settings import Settings
from tasks.live_runs import live_run
from tests.own_process import succeeds


def leave_a_killed_run(settings: Settings, flow_run_id: str) -> None:
    """Returns when the process of that run is dead."""
    assert succeeds(partial(_die, settings, flow_run_id), seconds=120)


def _die(settings: Settings, flow_run_id: str) -> None:
    with live_run(settings, flow_run_id):
        os._exit(0)
