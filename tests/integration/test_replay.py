"""Copies that learn from the pretrained model, not from the data, outside of their segment."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from deme_core.model_folder import load_denoiser
from deme_core.recipe import FinetuneSpec
from deme_core.recipe_file import load_recipe
from deme_core.segments import recipe_segments
from flows.trainings import Trainings
from tasks.work.base import execute
from tests.small_run import finetune_job, make_context, pretrain_job


@pytest.mark.parametrize("how", [{}, {"lora": {"rank": 4}, "learning_rate": 1e-2}], ids=["whole", "LoRA"])
def test_a_copy_that_replays_the_pretrained_model_keeps_to_it_outside_of_its_segment(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    context = make_context(tmp_path)
    pretrained = execute(pretrain_job(), context, lambda _: None)
    noisy = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def strayed(replay: str) -> float:
        settings = {"consistency_weight": 0.0, "global_sampling_probability": 0.8, "ema_decay": 0.5, **how}
        copy = execute(finetune_job(pretrained, 0, num_steps=30, replay=replay, **settings), context, lambda _: None)
        assert copy.metrics["pretrained_weights"] == pretrained.metrics["weights_digest"]
        with torch.no_grad():
            before, after = (
                load_denoiser(context.open_model(model.ref)).eval()(noisy, 900).sample for model in (pretrained, copy)
            )
        return float((after - before).square().mean())

    assert strayed("pretrained") < 0.5 * strayed("data")


def test_the_control_has_nothing_to_replay_and_the_summed_rank() -> None:
    finetune = FinetuneSpec(num_steps=1, replay="pretrained", consistency_weight=0.0, lora={"rank": 4})
    control = finetune.for_control(3)
    assert finetune.has_teacher and not control.has_teacher
    assert control.lora is not None and control.lora.rank == 12
    plain = FinetuneSpec(num_steps=1)
    assert plain.for_control(3) == plain
    assert "replay" not in plain.model_dump(), "digests made before stay"


def test_a_run_finetunes_its_control_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainings, "_finetune", lambda _self, spec, *_: spec)
    recipe = load_recipe("digits", ["finetune.replay=pretrained"])
    segments = recipe_segments(recipe.segments, 1000)
    artifact: Any = None
    trainings = Trainings(recipe, pretrained=artifact, encoded=artifact, segments=segments)
    assert trainings.control() == recipe.finetune.for_control(len(segments)) != recipe.finetune
    assert trainings.copies() == [recipe.finetune] * len(segments)


def test_a_reweighted_control_changes_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainings, "_finetune", lambda _self, spec, *_: spec)
    artifact: Any = None

    def asked(*overrides: str) -> Trainings:
        recipe = load_recipe("digits", overrides)
        return Trainings(recipe, artifact, artifact, recipe_segments(recipe.segments, 1000))

    plain, reweighted = asked(), asked("finetune.control_min_snr_gamma=5")
    assert reweighted.copies() == plain.copies()
    gamma: Any = [plain.control(), reweighted.control(), asked("finetune.min_snr_gamma=3").control()]
    assert [spec.min_snr_gamma for spec in gamma] == [None, 5, 3]
    assert not {"min_snr_gamma", "control_min_snr_gamma"} & {*plain.control().model_dump()}, "digests stay"


def test_replay_without_a_chance_is_refused() -> None:
    with pytest.raises(ValidationError, match="has no effect with global_sampling_probability 0"):
        FinetuneSpec(num_steps=1, replay="pretrained", global_sampling_probability=0.0)
