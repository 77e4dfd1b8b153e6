"""What a finetuning makes of its job before it trains."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, DistillSpec, FinetuneSpec
from deme_core.segments import TimestepSegment
from deme_core.settings import Settings
from deme_core.timesteps import TimestepSampler
from deme_core.training_plan import TrainingPlan
from tasks.jobs import DistillJob, FinetuneJob, ImportJob
from tasks.work import distill, finetune, training_run
from tasks.work.base import JobContext, execute
from tests.tiny_models import one_level_unet, write_tiny_folder

CONFIG = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}


class Planned(BaseException):
    """What a test raises where the training would begin."""


class Planner:
    """Tells how copies of a tiny model would be trained."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._context = JobContext(Settings.model_validate({"DEME_HOME": home, "DEME_STORE_URI": None}), "cpu")
        folder = write_tiny_folder(home / "model", one_level_unet(), **CONFIG)
        self._pretrained: ArtifactRef = execute(ImportJob(source=str(folder)), self._context, lambda _: None).ref

    def _job(self, low: int = 0, high: int = 500, **settings: Any) -> FinetuneJob:
        return FinetuneJob(
            label="a copy",
            pretrained=self._pretrained,
            dataset=DatasetSpec(source="digits", num_images=40),
            finetune=FinetuneSpec.model_validate({"num_steps": 4} | settings),
            low=low,
            high=high,
            num_steps=3,
        )

    def plan(self, low: int = 0, high: int = 500, **settings: Any) -> TrainingPlan:
        return self._planned(finetune, self._job(low, high, **settings))

    def plan_of_distillation(self) -> TrainingPlan:
        job = DistillJob(
            label="distilled",
            pretrained=self._pretrained,
            merged=self._pretrained,
            experts=(self._pretrained,) * 2,
            segment_edges=(0, 400, 1000),
            dataset=DatasetSpec(source="digits", num_images=40),
            distill=DistillSpec(num_steps=7),
        )
        return self._planned(distill, job)

    def _planned(self, work: Any, job: Any) -> TrainingPlan:
        def begin(*_: Any, plan: TrainingPlan, **__: Any) -> None:
            raise Planned(plan)

        found: TrainingPlan = self._raised("run_training", begin, work, job)
        return found

    def first_batch(self, low: int, high: int) -> torch.Tensor:
        def begin(_model: Any, _adapter: Any, batches: Any, **_: Any) -> None:
            raise Planned(next(iter(batches(0))).latents)

        found: torch.Tensor = self._raised("Training", begin, finetune, self._job(low, high))
        return found

    def first_factor(self, low: int, high: int) -> torch.Tensor:
        def begin(model: torch.nn.Module, *_: Any, **__: Any) -> None:
            raise Planned(next(tensor.clone() for name, tensor in model.state_dict().items() if "lora_A" in name))

        found: torch.Tensor = self._raised("Training", begin, finetune, self._job(low, high, lora={"rank": 2}))
        return found

    def _raised(self, name: str, begin: Any, work: Any, job: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Planned) as planned:
            patch.setattr(training_run, name, begin)
            list(work.run(job, self._context, self._home / "out", "digest"))
        return planned.value.args[0]


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    return Planner(tmp_path_factory.mktemp("home"))


def test_a_copy_is_trained_as_its_job_says(planner: Planner) -> None:
    paper = {"timestep_sampling": "per_batch_mirrored", "global_sampling_probability": 0.1, "consistency_weight": 0.25}
    plan = planner.plan(100, 400, **paper)
    assert plan.sampler == TimestepSampler(TimestepSegment(100, 400), 1000, 0.1, per_batch_mirrored=True)
    assert (plan.num_steps, plan.consistency_weight, plan.replay_from_teacher) == (3, 0.25, False)
    plain = planner.plan(replay="pretrained", consistency_weight=0.0)
    assert not plain.sampler.per_batch_mirrored
    assert (plain.consistency_weight, plain.replay_from_teacher) == (0.0, True)


def test_every_segment_has_noise_of_its_own(planner: Planner) -> None:
    plans = [planner.plan(0, 500), planner.plan(0, 400), planner.plan(100, 500), planner.plan(0, 500, seed=1)]
    assert len({plan.seed for plan in plans}) == len(plans)
    assert planner.plan(0, 500).seed == plans[0].seed


def test_every_segment_has_images_in_an_order_of_its_own(planner: Planner) -> None:
    first, again, other = (planner.first_batch(low, low + 500) for low in (0, 0, 500))
    assert first.equal(again)
    assert not first.equal(other)


def test_a_distillation_learns_of_its_experts_alone(planner: Planner) -> None:
    plan = planner.plan_of_distillation()
    assert plan.sampler == TimestepSampler(TimestepSegment(0, 1000), 1000, 0.0)
    assert (plan.num_steps, plan.diffusion_weight, plan.consistency_weight) == (7, 0.0, 1.0)


def test_every_adapter_starts_at_random_factors_of_its_own(planner: Planner) -> None:
    first, again, other = (planner.first_factor(low, low + 500) for low in (0, 0, 500))
    assert first.equal(again)
    assert not first.equal(other)
