import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import loss_slopes
from benchmarks.loss_slopes import Slopes, measure_slopes
from benchmarks.measurement import QUICK_OVERRIDES
from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec
from tasks.jobs import LossJob

# Losses of two segments, quadratic in the weights of two copies.
BASE = np.array([3.0, 1.0])
SLOPE = np.array([[-0.4, 0.2], [0.1, -0.3]])  # Segments x copies.
BEND = np.array([[0.5, 0.25], [1.0, 2.0]])


def do(job: LossJob) -> Any:
    weights = np.array(job.weights)
    return SimpleNamespace(metrics={"value": (BASE + SLOPE @ weights + BEND @ weights**2).tolist()})


@pytest.mark.parametrize("step", [0.25, 1.0])
def test_slopes_of_a_parabola_are_exact(step: float) -> None:
    ref = ArtifactRef("file:///store/finetune/a", "a")
    laboratory: Any = SimpleNamespace(
        do=do,
        edges=(0, 500, 1000),
        pretrained=SimpleNamespace(ref=ref),
        recipe=SimpleNamespace(dataset=DatasetSpec(source="digits", resolution=8)),
    )
    found = measure_slopes(laboratory, (ref, ref), step=step)
    for index, slopes in enumerate(found):
        np.testing.assert_allclose(slopes.by_segment, SLOPE[:, index] / BASE.sum())
        assert slopes.curvature == pytest.approx(2 * BEND[:, index].sum() / BASE.sum())
    lowest = min((SLOPE[:, 0].sum() * w + BEND[:, 0].sum() * w**2) / BASE.sum() for w in np.linspace(-1, 1, 2001))
    assert found[0].best_change == pytest.approx(lowest, abs=1e-6)


def test_a_copy_whose_loss_has_no_minimum_is_given_no_best_weight() -> None:
    assert Slopes(np.array([-0.1]), -1.0).best_change == 0.0


def test_it_measures_copies_confined_ones_and_the_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEME_HOME", str(tmp_path))
    monkeypatch.delenv("DEME_STORE_URI", raising=False)
    loss_slopes.main([f"--set={setting}" for setting in (*QUICK_OVERRIDES, "segments={count: 2}")])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: len(found[name]) for name in ("copy", "confined", "control")} == {
        "copy": 2,
        "confined": 2,
        "control": 1,
    }
    assert all(slopes["curvature"] != 0 for name in ("copy", "control") for slopes in found[name])
