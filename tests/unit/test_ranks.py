"""The processes of a data-parallel training: how they start. How they train is in tests/cluster."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tasks.work import ranks
from tests.small_run import make_context


def test_a_process_that_does_not_start_takes_its_fellows_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fellow = Mock()

    def start(order: dict[str, Any], *_: Any) -> Mock:
        if order["rank"] == 2:
            raise OSError("no more processes")
        return fellow

    monkeypatch.setattr(ranks, "_start", start)
    job, num_threads = Mock(num_processes=3), torch.get_num_threads()
    job.model_dump.return_value = {}
    with pytest.raises(OSError, match="no more processes"), ranks.all_ranks(job, "digest", make_context(tmp_path)):
        raise AssertionError
    fellow.kill.assert_called_once_with()
    assert torch.get_num_threads() == num_threads
