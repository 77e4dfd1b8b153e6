"""`finetune.num_processes`: two CPU processes over gloo train as one with the doubled batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from deme_core.artifacts import ArtifactRef
from deme_core.data_parallel import Share
from deme_core.errors import WorkerDiedError
from deme_core.images.draws import BatchSchedule
from deme_core.recipe import DatasetSpec, FinetuneSpec, LoraSpec
from deme_core.settings import Settings
from tasks.jobs import FinetuneJob, ImportJob, JobResult
from tasks.work.base import JobContext, execute
from tests.tiny_models import one_level_unet, randomize, write_tiny_folder

CONFIG = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
NUM_STEPS = 12


@contextmanager
def _context(home: Path) -> Iterator[JobContext]:
    with pytest.MonkeyPatch.context() as patch:  # The other process reads the environment.
        patch.setenv("DEME_HOME", str(home))
        patch.delenv("DEME_STORE_URI", raising=False)
        yield JobContext(Settings(), "cpu")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[JobResult, dict[str, torch.Tensor]]:
    """What two processes make of it, undisturbed."""
    home = tmp_path_factory.mktemp("two")
    with _context(home) as context:
        return _train(_job(context, home, batch_size=4, num_processes=2), context)


def _job(context: JobContext, home: Path, **finetune: Any) -> FinetuneJob:
    folder = write_tiny_folder(home / "model", randomize(one_level_unet(), seed=0), **CONFIG)
    pretrained: ArtifactRef = execute(ImportJob(source=str(folder)), context, lambda _: None).ref
    spec = FinetuneSpec(
        num_steps=NUM_STEPS, learning_rate=1e-3, gradient_accumulation_steps=2, checkpoint_every=4, **finetune
    )
    dataset = DatasetSpec(source="digits", num_images=50, random_flip=True)
    return FinetuneJob(
        label="test", pretrained=pretrained, dataset=dataset, finetune=spec, low=0, high=500, num_steps=NUM_STEPS
    )


def _train(job: FinetuneJob, context: JobContext) -> tuple[JobResult, dict[str, torch.Tensor]]:
    result = execute(job, context, lambda _: None)
    (weights,) = context.fetch(result.ref).rglob("*.safetensors")
    return result, load_file(weights)


def test_two_processes_train_as_one_with_the_doubled_batch(
    two: tuple[JobResult, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    with _context(tmp_path / "home") as context:
        one, weights_of_one = _train(_job(context, tmp_path, batch_size=8), context)
    result, weights_of_two = two
    assert result.ref.digest != one.ref.digest
    assert result.metrics["timestep_histogram"] == one.metrics["timestep_histogram"]
    for name in ("diffusion_loss", "consistency_loss", "grad_norm"):
        found, expected = ([record[name] for record in each.metrics["history"]] for each in (result, one))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    for name, weight in weights_of_one.items():
        torch.testing.assert_close(weights_of_two[name], weight, rtol=1e-3, atol=1e-5)
    start = load_file(next((tmp_path / "model").rglob("*.safetensors")))
    assert any((weights_of_one[name] - weight).abs().max() > 1e-3 for name, weight in start.items())


def test_two_processes_train_one_lora_whose_teacher_is_the_model_itself(tmp_path: Path) -> None:
    with _context(tmp_path / "home") as context:
        one, two = (
            _train(_job(context, tmp_path, batch_size=8 // count, num_processes=count, lora=LoraSpec(rank=2)), context)[
                1
            ]
            for count in (1, 2)
        )
    assert any(name.endswith("lora_B.weight") and factor.abs().max() > 1e-3 for name, factor in one.items())
    for name, factor in one.items():
        torch.testing.assert_close(two[name], factor, rtol=1e-3, atol=1e-5)


def test_each_process_takes_its_part_of_the_same_batch() -> None:
    whole = BatchSchedule(50, 8, 3, True, 0.5)[7]
    parts = [BatchSchedule(50, 4, 3, True, 0.5, Share(rank, 2))[7] for rank in (0, 1)]
    for name in ("indices", "crops", "mirrored", "dropped"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_a_training_that_lost_a_process_fails_at_once_and_goes_on_from_its_checkpoint(
    two: tuple[JobResult, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    def kill_other(record: dict[str, Any]) -> None:
        if record.get("global_step") == 8:
            (other,) = [p for p in psutil.Process().children() if "tasks.work.ranks" in p.cmdline()]
            other.kill()

    records: list[dict[str, Any]] = []
    with _context(tmp_path / "home") as context:
        job = _job(context, tmp_path, batch_size=4, num_processes=2)
        with pytest.raises(WorkerDiedError, match="ended before the others"):
            execute(job, context, kill_other)
        result = execute(job, context, records.append)
        (weights,) = context.fetch(result.ref).rglob("*.safetensors")
    assert records[0]["message"] in ("resumed at step 4", "resumed at step 8")
    for name, weight in load_file(weights).items():
        assert torch.equal(weight, two[1][name])
