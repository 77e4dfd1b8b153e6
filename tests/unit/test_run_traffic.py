from typing import Any

from benchmarks.run_traffic import Artifacts, Folder, Traffic, estimate_traffic, measure_artifacts
from deme_core.denoiser_size import DenoiserSize
from deme_core.recipe import Recipe

SIZE = DenoiserSize(1000, 10_000, num_trained=1100, trained_forward_flops=11_000)


def recipe(count: int = 2, **finetune: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "pretrained": {"source": "folder"},
            "dataset": {"source": "imagefolder", "path": "images", "resolution": 8},
            "segments": {"count": count},
            "finetune": {"num_steps": 9, "checkpoint_every": 2, **finetune},
            "merge": {"weights": [0.1] * count},
            "evaluate": {"num_images": 50},
        }
    )


def artifacts(spec: Recipe) -> Artifacts:
    return measure_artifacts(spec, SIZE, num_real=100, num_features=16)


def test_artifacts_are_as_large_as_what_they_hold() -> None:
    found = artifacts(recipe())
    assert (found.stock.num_bytes, found.copy.num_bytes) == (4000, 4400)
    assert found.checkpoint.num_bytes == 4 * 4400  # Weights, their average, and two moments.
    assert artifacts(recipe(optimizer="adamw_8bit")).checkpoint.num_bytes == 2 * 4400 + 2200
    assert found.real.num_bytes == 100 * 16 * 4


def test_more_checkpoints_write_more_and_read_nothing() -> None:
    # Two copies save 4 each and the control 8; then half of them.
    often, seldom = (estimate_traffic(r, artifacts(r)) for r in (recipe(), recipe(checkpoint_every=4)))
    assert often.written - seldom.written == (16 - 8) * 4 * 4400
    assert often.read == seldom.read
    assert often.calls - seldom.calls == 8 * 9


def test_a_segment_more_adds_a_training_a_longer_control_and_another_expert() -> None:
    two, three = (estimate_traffic(r, artifacts(r)) for r in (recipe(2), recipe(3)))
    checkpoints = (3 * 4 + 13) - (2 * 4 + 8)
    assert three.written - two.written == checkpoints * 4 * 4400 + 4400 + 2 * 1500  # The copy, its loss, two manifests.
    # The merge, the ensemble of each seed and its held-out loss read the new copy; it reads theta_0.
    assert three.read - two.read == 5 * (4400 + 1500) + (4000 + 1500)


def test_a_job_looks_once_for_what_it_makes() -> None:
    assert Folder(4, 1000).made() == Traffic(1 + 4 + 1, written=2500)
    assert Folder(4, 1000).fetched() == Traffic(1 + 4, read=2500)


def test_what_is_large_goes_in_parts_of_8_and_comes_in_parts_of_16_mib() -> None:
    assert [Folder(1, 2**23 + more).made().parts for more in (-1, 0, 1)] == [0, 2, 3]  # Two begin and complete it.
    assert [Folder(1, 2**24 + more).fetched().parts for more in (0, 1)] == [0, 1]
    assert (Traffic(1, 2, 3, 4) + Traffic(1, 1, 1, 1)) * 2 == Traffic(4, 6, 8, 10)
