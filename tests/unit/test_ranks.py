"""The processes of a data-parallel training: how they start. How they train is in tests/cluster."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from deme_core import data_parallel
from deme_core.data_parallel import Share, join
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


@pytest.mark.parametrize(
    ("device", "fails", "is_left"), [("cuda", False, True), ("cuda", True, False), ("cpu", True, True)]
)
def test_over_nccl_a_process_does_not_wait_for_others_that_failed(
    device: str, fails: bool, is_left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = Mock()
    distributed.is_initialized.return_value = True
    monkeypatch.setattr(data_parallel, "distributed", distributed)
    monkeypatch.setattr(torch.cuda, "set_device", Mock())
    try:
        with join(Share(0, 2), tmp_path / "point", device):
            if fails:
                raise OSError
    except OSError:
        pass
    assert distributed.destroy_process_group.called == is_left


def test_a_process_that_fails_says_why_and_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    with ranks._told(tmp_path / "error-1"):
        raise ValueError("no more memory")
    assert ended == [1]
    assert (tmp_path / "error-1").read_text() == "ValueError: no more memory"
