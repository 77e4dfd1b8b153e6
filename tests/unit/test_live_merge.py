from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deme_core.checkpoint import Checkpoint, save_tensors
from deme_core.errors import IncompatibleCheckpointsError, InputError
from deme_core.live_merge import LiveMerge
from deme_core.merge import merge_checkpoints
from deme_core.merge_methods import TaskArithmetic
from deme_core.projection import attach_projections
from tests.tiny_models import predict, randomize, same_bits, tiny_unet


def saved_experts(folder: Path, *, projections: bool) -> list[Checkpoint]:
    experts = []
    for seed in (1, 2):
        model = tiny_unet()
        if projections:
            attach_projections(model)
        save_tensors(folder / f"{seed}.safetensors", randomize(model, seed=seed).state_dict())
        experts.append(Checkpoint(folder / f"{seed}.safetensors"))
    return experts


@pytest.mark.parametrize("projections", [False, True])
def test_a_live_merge_equals_the_merged_file_for_each_of_many_weights(tmp_path: Path, projections: bool) -> None:
    save_tensors(tmp_path / "pretrained", tiny_unet().state_dict())
    experts = saved_experts(tmp_path, projections=projections)
    model = tiny_unet()
    live = LiveMerge(model, experts)
    original = predict(model)

    for weights in ((0.3, 0.4), (1.0, 1.0), (0.0, 0.0), (-0.5, 0.25), (0.3, 0.4)):
        live.apply(TaskArithmetic(weights))
        merge_checkpoints(
            Checkpoint(tmp_path / "pretrained"),
            dict(zip("ab", experts, strict=True)),
            TaskArithmetic(weights),
            tmp_path / "merged",
        )
        merged = load_file(tmp_path / "merged")
        state = model.state_dict()
        assert state.keys() == merged.keys()
        assert all(same_bits(state[name], tensor) for name, tensor in merged.items())

    live.apply(TaskArithmetic((0.0, 0.0)))
    assert predict(model).equal(original)


def test_the_model_changes_in_place_and_the_experts_do_not(tmp_path: Path) -> None:
    model = tiny_unet()
    parameters = list(model.parameters())
    expert = {name: tensor.clone() for name, tensor in randomize(tiny_unet(), seed=1).state_dict().items()}
    before = {name: tensor.clone() for name, tensor in expert.items()}
    original = predict(model)

    live = LiveMerge(model, [expert])
    assert predict(model).equal(original)
    live.apply(TaskArithmetic((1.0,)))
    predicted = predict(model)
    live.apply(TaskArithmetic((0.5,)))

    assert not predicted.equal(original)
    assert all(left is right for left, right in zip(parameters, model.parameters(), strict=True))
    assert all(same_bits(expert[name], tensor) for name, tensor in before.items())


def test_experts_of_another_model_are_refused() -> None:
    other = tiny_unet(block_out_channels=[8, 8]).state_dict()
    with pytest.raises(IncompatibleCheckpointsError, match="expert 1 does not hold the tensors of the pretrained"):
        LiveMerge(tiny_unet(), [tiny_unet().state_dict(), other])


def test_a_wrong_number_of_weights_is_refused_and_changes_nothing() -> None:
    model = tiny_unet()
    original = predict(model)
    live = LiveMerge(model, [randomize(tiny_unet(), seed=1).state_dict()])
    with pytest.raises(InputError, match="2 merge weights were given for 1 experts"):
        live.apply(TaskArithmetic((0.5, 0.5)))
    assert torch.equal(predict(model), original)
