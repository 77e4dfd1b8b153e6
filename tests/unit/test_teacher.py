import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deme_core.families import EncodedBatch
from deme_core.lora import LoraTeacher
from deme_core.noise_process import FlowMatching
from deme_core.recipe import DistillSpec
from deme_core.segments import TimestepSegment
from deme_core.teacher import Teacher
from deme_core.timesteps import TimestepSampler
from deme_core.training import Training
from deme_core.training_plan import TrainingPlan
from tests.tiny_models import one_level_unet, same_bits, tiny_adapter, tiny_images

EVERYTHING = TimestepSegment(0, 1000)
SEGMENTS = (TimestepSegment(0, 300), TimestepSegment(300, 1000))


def experts() -> list[torch.nn.Module]:
    return [one_level_unet(seed) for seed in (1, 2)]


def distillation(model: torch.nn.Module, teacher: Teacher, num_steps: int = 30) -> Training:
    def batches(first: int) -> Iterator[EncodedBatch]:
        return (EncodedBatch(tiny_images(16, seed=number), {}) for number in itertools.count(first))

    return Training(
        model,
        tiny_adapter(),
        batches,
        spec=DistillSpec(num_steps=num_steps, batch_size=16, learning_rate=3e-3),
        plan=TrainingPlan("distillation", TimestepSampler(EVERYTHING, 1000, 0.0), num_steps, 1.0, 0, 0.0),
        teacher=teacher,
    )


def test_each_row_is_taught_by_the_expert_of_its_segment() -> None:
    models, noisy, timesteps = experts(), tiny_images(5), torch.tensor([999, 0, 299, 300, 10])
    taught = Teacher(models, SEGMENTS).predict(tiny_adapter(), noisy, timesteps, {})
    for row, expert in enumerate([1, 0, 0, 1, 0]):
        with torch.no_grad():
            alone = models[expert](noisy[row : row + 1], timesteps[row : row + 1]).sample
        assert torch.allclose(taught[row : row + 1], alone, atol=1e-6)
    assert not taught.requires_grad


def test_each_row_is_taught_with_its_own_conditioning() -> None:
    def predict(_model: Any, noisy: torch.Tensor, _timesteps: Any, conditioning: Any) -> torch.Tensor:
        return conditioning["caption"].view(-1, 1, 1, 1).expand_as(noisy)

    adapter: Any = SimpleNamespace(noise_process=tiny_adapter().noise_process, predict=predict)
    captions, timesteps = torch.arange(4.0), torch.tensor([999, 0, 299, 300])
    taught = Teacher(experts(), SEGMENTS).predict(adapter, tiny_images(4), timesteps, {"caption": captions})
    assert torch.equal(taught[:, 0, 0, 0], captions)


def test_one_model_teaches_all_timesteps() -> None:
    (model, _), noisy, timesteps = experts(), tiny_images(3), torch.tensor([0, 500, 999])
    taught = Teacher([model]).predict(tiny_adapter(), noisy, timesteps, {})
    assert torch.equal(taught, model(noisy, timesteps).sample)


@pytest.mark.parametrize(
    "teacher",
    [Teacher(experts()[:1]), Teacher(experts(), SEGMENTS), LoraTeacher(one_level_unet())],
    ids=["one", "experts", "LoRA"],
)
def test_a_teacher_is_told_timesteps_as_its_noise_process_has_them(teacher: Teacher | LoraTeacher) -> None:
    def predict(_model: Any, noisy: torch.Tensor, timesteps: torch.Tensor, _conditioning: Any) -> torch.Tensor:
        return timesteps.view(-1, 1, 1, 1).expand_as(noisy)

    adapter: Any = SimpleNamespace(noise_process=FlowMatching(1000), predict=predict)
    taught = teacher.predict(adapter, tiny_images(4), torch.tensor([0, 299, 300, 999]), {})
    assert taught[:, 0, 0, 0].tolist() == [1.0, 300.0, 301.0, 1000.0]


@pytest.mark.parametrize("segments", [(), SEGMENTS, (*SEGMENTS, EVERYTHING)])
def test_there_is_one_model_for_each_segment(segments: tuple[TimestepSegment, ...]) -> None:
    num_models = 2 if len(segments) != 2 else 1
    with pytest.raises(ValueError, match="cannot teach"):
        Teacher([one_level_unet()] * num_models, segments)


def test_a_distillation_approaches_its_experts_and_leaves_them_as_they_are() -> None:
    models, fresh = experts(), experts()
    records = list(distillation(one_level_unet(3), Teacher(models, SEGMENTS)).progress())
    assert records[-1].loss == records[-1].consistency_loss < 0.7 * records[0].consistency_loss
    for model, before in zip(models, fresh, strict=True):
        assert all(same_bits(model.state_dict()[name], tensor) for name, tensor in before.state_dict().items())


def test_who_knows_what_the_experts_know_learns_nothing() -> None:
    model, teacher = one_level_unet(1), Teacher([one_level_unet(1), one_level_unet(1)], SEGMENTS)
    training = distillation(model, teacher, num_steps=1)
    (record,) = training.progress()
    # Rows that go through a model in another batch differ in the last bits: a gradient of that size, not of the data's.
    assert record.loss < 1e-10
    assert record.diffusion_loss > 0.1
