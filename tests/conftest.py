"""Which tests share a process when they run side by side, with how many threads, and how hypothesis draws examples."""

from pathlib import PurePosixPath
from typing import Any

import pytest
import scipy.linalg  # noqa: F401  Its library, too, is limited, which only what is loaded can be.
import torch
from hypothesis import settings
from threadpoolctl import threadpool_limits
from xdist.scheduler import LoadScopeScheduling

# Threads that wait for their share of small matrices keep the other process of the tests from its core.
torch.set_num_threads(1)
threadpool_limits(1)

# The same examples in every run, so that what passes here passes in CI; `make test-faults` draws new ones, and more.
settings.register_profile("repeatable", derandomize=True, max_examples=50, deadline=None, database=None)
settings.register_profile("exploring", max_examples=1000, deadline=None)
settings.load_profile("repeatable")

# Files that share a running stack, a server, or the artifacts of one run.
_SHARED = {
    "test_platform.py": "stack",
    "test_browser.py": "stack",
    "test_watch.py": "stack",
    "test_run.py": "run",
    "test_report_page.py": "run",
    "test_services.py": "stack",
    "test_two_runs.py": "stack",
    "test_deploy.py": "Prefect",
    "test_watch_flow.py": "Prefect",
    "test_search_flow.py": "Prefect",
}


class _ByFile(LoadScopeScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return _SHARED.get(PurePosixPath(file).name, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByFile(config, log)
