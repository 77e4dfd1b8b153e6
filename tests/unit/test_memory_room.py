"""What a worker keeps in memory between jobs, and when it gives it up."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tasks.work import base
from tests.small_run import make_context, pretrain_job


@pytest.mark.parametrize("has_models", [True, False])
def test_a_job_without_room_is_done_once_more_without_what_others_left(
    has_models: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, records = make_context(tmp_path), list[Any]()
    if has_models:
        context.remember_latest(base.LIVE_MERGE, "candidate", object, num_kept=2)
    tried: list[bool] = []

    def execute(*_: Any) -> str:
        tried.append(bool(context._latest))
        if len(tried) == 1:
            raise torch.OutOfMemoryError
        return "result"

    monkeypatch.setattr(base, "execute", execute)
    if has_models:
        assert base.execute_with_room(Mock(), context, records.append) == "result"  # type: ignore[comparison-overlap]
        assert tried == [True, False]
        assert "too little memory" in records[0]["message"]
    else:
        with pytest.raises(torch.OutOfMemoryError):
            base.execute_with_room(Mock(), context, records.append)
        assert not records


def test_only_candidates_leave_the_models_of_a_search_in_memory(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    context.remember_latest(base.LIVE_MERGE, "candidate", object, num_kept=2)
    context.remember_latest("adapter", "of it", object, num_kept=1)
    base.execute(pretrain_job(), context, lambda _: None)
    assert "adapter" in context._latest
    assert base.LIVE_MERGE not in context._latest
