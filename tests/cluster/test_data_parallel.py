"""`finetune.num_processes`: two CPU processes over gloo train as one with the doubled batch."""

import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from deme_core.data_parallel import Share
from deme_core.errors import WorkerDiedError, WorkerStoppedError
from deme_core.file_store import FileStore
from deme_core.images.draws import BatchSchedule
from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, FinetuneSpec, LoraSpec, TrainingSpec
from deme_core.settings import Settings
from tasks.jobs import FinetuneJob, ImportJob, JobResult, PretrainJob
from tasks.work import ranks
from tasks.work.base import JobContext, execute
from tests.family_method import two_classes
from tests.integration.test_text_pretraining import TEXT_ENCODER
from tests.integration.test_text_pretraining import UNET as TEXT_UNET
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
    """What two processes make of it, undisturbed, in a folder whose modules must not be taken for those of DeMe."""
    home, folder = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("of the user")
    (folder / "tasks.py").write_text("raise SystemExit('of the user')")
    with _context(home) as context, chdir(folder):
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


# What NCCL's end is: a call that returns when all processes have made it (of gloo's each returns at once).
COLLECTIVE_END = """
import time
from pathlib import Path
from torch import distributed
end = distributed.destroy_process_group
def end_together():
    count, folder = distributed.get_world_size(), Path({folder!r})
    (folder / str(distributed.get_rank())).touch()
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < count:
        assert time.monotonic() < deadline, "NCCL would wait for ever"
        time.sleep(0.05)
    end()
"""


def test_processes_end_their_training_together_as_nccl_asks(
    two: tuple[JobResult, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ended").mkdir()
    script = COLLECTIVE_END.format(folder=str(tmp_path / "ended"))
    (tmp_path / "sitecustomize.py").write_text(f"{script}\ndistributed.destroy_process_group = end_together")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own: dict[str, Any] = {}
    exec(script, own)
    monkeypatch.setattr(distributed, "destroy_process_group", own["end_together"])
    with _context(tmp_path / "home") as context:
        weights = _train(_job(context, tmp_path, batch_size=4, num_processes=2), context)[1]
    assert sorted(path.name for path in (tmp_path / "ended").iterdir()) == ["0", "1"]
    assert all(torch.equal(weight, two[1][name]) for name, weight in weights.items())


def test_two_processes_train_one_lora_whose_teacher_is_the_model_itself(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora": LoraSpec(rank=2), "replay": "pretrained"}
    with _context(tmp_path / "home") as context:
        one, two = (
            _train(_job(context, tmp_path, batch_size=8 // count, num_processes=count, **settings), context)[1]
            for count in (1, 2)
        )
    assert any(name.endswith("lora_B.weight") and factor.abs().max() > 1e-3 for name, factor in one.items())
    for name, factor in one.items():
        torch.testing.assert_close(two[name], factor, rtol=1e-3, atol=1e-5)


def test_two_processes_pretrain_a_model_that_takes_text(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    captioned = two_classes(tmp_path / "images").model_copy(update={"label_column": None})
    histories = []
    for count in (1, 2):
        with _context(tmp_path / str(count)) as context:
            training = TrainingSpec(num_steps=3, batch_size=8 // count, num_processes=count, learning_rate=1e-3)
            job = PretrainJob(
                dataset=captioned, unet=TEXT_UNET, noise_scheduler={}, training=training, text_encoder=TEXT_ENCODER
            )
            histories.append(execute(job, context, lambda _: None).metrics["history"])
    for record, expected in zip(*histories, strict=True):
        np.testing.assert_allclose(record["diffusion_loss"], expected["diffusion_loss"], rtol=1e-4)


def test_each_process_takes_its_part_of_the_same_batch() -> None:
    whole = BatchSchedule(50, 8, 3, True, 0.5)[7]
    parts = [BatchSchedule(50, 4, 3, True, 0.5, Share(rank, 2))[7] for rank in (0, 1)]
    for name in ("indices", "crops", "mirrored", "dropped"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def _other_process() -> psutil.Process:
    (other,) = [p for p in psutil.Process().children() if "tasks.work.ranks" in p.cmdline()]
    return other


def test_a_training_that_lost_a_process_fails_at_once_and_goes_on_from_its_checkpoint(
    two: tuple[JobResult, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    def kill_other(record: dict[str, Any]) -> None:
        if record.get("global_step") == 8:
            _other_process().kill()

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


class _SetLater(threading.Event):
    """Is set from the third time on that it is asked."""

    times_asked = 0

    def is_set(self) -> bool:
        self.times_asked += 1
        return self.times_asked >= 3


def test_sigterm_to_all_processes_leaves_a_checkpoint_of_the_step_they_are_at(
    two: tuple[JobResult, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a service manager sends it: to the worker, whose handler sets `stop`, and to its children.

    However long the checkpoint takes to store: the others wait for the end of that.
    """
    records: list[dict[str, Any]] = []
    exits: list[int] = []
    put_file = FileStore.put_file

    def put_slowly(store: FileStore, key: str, path: Path) -> None:
        if getattr(context.stop, "times_asked", 0) >= 3 and path.suffix == ".safetensors":
            with pytest.raises(psutil.TimeoutExpired):
                _other_process().wait(5)
        put_file(store, key, path)

    monkeypatch.setattr(FileStore, "put_file", put_slowly)
    monkeypatch.setattr(ranks, "_SECONDS_TO_NOTICE", 0.1)
    monkeypatch.setattr("os._exit", exits.append)  # Of this process.
    with _context(tmp_path / "home") as context:
        job = _job(context, tmp_path, batch_size=4, num_processes=2)

        def take_away(record: dict[str, Any]) -> None:
            if record.get("global_step") == 4:
                _other_process().terminate()
                context.stop = _SetLater()

        with pytest.raises(WorkerStoppedError):
            execute(job, context, take_away)
        assert not exits
        context.stop = threading.Event()
        result = execute(job, context, records.append)
        (weights,) = context.fetch(result.ref).rglob("*.safetensors")
    assert records[0]["message"] == "resumed at step 6"
    for name, weight in load_file(weights).items():
        assert torch.equal(weight, two[1][name])
