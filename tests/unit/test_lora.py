import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from deme_core.checkpoint import Checkpoint, save_tensors
from deme_core.errors import FrozenModelChangedError, InputError, ModelFolderError
from deme_core.families import EncodedBatch
from deme_core.generate import Ensemble
from deme_core.live_merge import LiveMerge
from deme_core.lora import (
    LoraEnsemble,
    LoraExpert,
    LoraFactors,
    LoraTeacher,
    attach_lora,
    read_factors,
    sum_adapters,
    trained_factors,
    truncate,
    truncate_difference,
    write_factors,
)
from deme_core.lora.teacher import without_lora
from deme_core.merge import merge_checkpoints, merged_tensors
from deme_core.merge_methods import Average, BlockWeights, Dare, TaskArithmetic, TensorMerge, Ties
from deme_core.merge_methods.block_weights import block_names
from deme_core.recipe import FinetuneSpec, LoraSpec, TrainingSpec
from deme_core.segments import TimestepSegment
from deme_core.teacher import Teacher
from deme_core.timesteps import TimestepSampler
from deme_core.training import Training
from deme_core.training_checkpoint import restore_checkpoint, save_checkpoint
from deme_core.training_plan import TrainingPlan
from tests.tiny_models import predict, same_bits, tiny_adapter, tiny_images, tiny_unet

SPEC = LoraSpec(rank=3, alpha=2.0, target_modules=("to_q", "to_out.0", "conv1"))


def random_factors(model: nn.Module, spec: LoraSpec = SPEC, *, seed: int) -> dict[str, LoraFactors]:
    """Returns an adapter none of whose entries are zero."""
    model = copy.deepcopy(model)
    attach_lora(model, spec, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    trained = {name: torch.randn(p.shape, generator=rng) * 0.1 for name, p in model.named_parameters()}
    return trained_factors(trained, spec)


def by_hand(base: torch.Tensor, factors: LoraFactors, weight: float = 1.0) -> np.ndarray[Any, Any]:
    """Returns W + weight B A, float64."""
    product = factors.up.flatten(1).double().numpy() @ factors.down.flatten(1).double().numpy()
    return np.asarray(base.double().numpy() + weight * product.reshape(base.shape))


def batches(first: int) -> Iterator[EncodedBatch]:
    return (EncodedBatch(tiny_images(4, seed=number), {}) for number in itertools.count(first))


def training(model: nn.Module, teacher: Teacher | LoraTeacher | None = None, **spec: Any) -> Training:
    sampler = TimestepSampler(TimestepSegment(0, 500), 1000, 0.3)
    return Training(
        model,
        tiny_adapter(),
        batches,
        spec=TrainingSpec(num_steps=4, **{"batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.5, **spec}),
        plan=TrainingPlan("segment", sampler, 4, consistency_weight=1.0 if teacher else 0.0),
        teacher=teacher,
    )


def with_lora(seed: int = 0, spec: LoraSpec = SPEC, **overrides: Any) -> nn.Module:
    model = tiny_unet(**overrides)
    attach_lora(model, spec, seed=seed)
    return model


def test_a_fresh_adapter_changes_nothing_and_one_switched_off_is_the_pretrained_model() -> None:
    pretrained, model = tiny_unet(), with_lora()
    assert predict(model).equal(predict(pretrained))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1)
    assert not predict(model).equal(predict(pretrained))
    with without_lora(model):
        assert predict(model).equal(predict(pretrained))
    assert not predict(model).equal(predict(pretrained))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_the_seed_names_the_adapter() -> None:
    first, second, other = with_lora(1).state_dict(), with_lora(1).state_dict(), with_lora(2).state_dict()
    assert all(same_bits(tensor, second[name]) for name, tensor in first.items())
    assert any(not same_bits(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("overrides", [{}, {"dropout": 0.5}])
def test_the_model_teaches_itself_what_a_frozen_copy_would(overrides: dict[str, Any]) -> None:
    model = with_lora(**overrides)
    own = training(model, LoraTeacher(model))
    other = training(with_lora(**overrides), Teacher([tiny_unet(**overrides)]))
    assert list(own.progress())[-1].consistency_loss == list(other.progress())[-1].consistency_loss > 0
    expected = other.averaged_tensors()
    assert expected.keys() == own.averaged_tensors().keys()
    assert all(same_bits(tensor, expected[name]) for name, tensor in own.averaged_tensors().items())


def test_nothing_but_the_adapter_is_trained_averaged_or_saved(tmp_path: Path) -> None:
    model = with_lora()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = training(model, LoraTeacher(model))
    list(run.progress())
    changed = {name for name, tensor in model.state_dict().items() if not same_bits(tensor, before[name])}
    assert changed == set(run.averaged_tensors()) == {name for name in before if ".lora_" in name}
    save_checkpoint(run, tmp_path)
    saved = {key for key in Checkpoint(tmp_path / "tensors.safetensors") if key != "timestep_counts"}
    assert saved
    assert all(".lora_" in key for key in saved)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, channels_last: bool) -> None:
    model = with_lora()
    whole = training(model, LoraTeacher(model), checkpoint_every=2, channels_last=channels_last)
    for progress in whole.progress():
        if progress.global_step == 2:
            save_checkpoint(whole, tmp_path)
    again = with_lora(seed=7)  # Its random A must not matter.
    resumed = training(again, LoraTeacher(again), channels_last=channels_last)
    restore_checkpoint(resumed, tmp_path)
    list(resumed.progress())
    for expected, actual in (
        (whole.averaged_tensors(), resumed.averaged_tensors()),
        (model.state_dict(), again.state_dict()),
    ):
        assert all(same_bits(tensor, actual[name]) for name, tensor in expected.items())


def test_a_frozen_model_that_changes_is_found() -> None:
    model = with_lora()
    run = training(model, LoraTeacher(model), checkpoint_every=1)
    with pytest.raises(FrozenModelChangedError):
        for _ in run.progress():
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if ".lora_" not in name).add_(1e-3)


def test_the_factors_of_a_trained_model_make_it_again() -> None:
    model = with_lora()
    run = training(model)
    list(run.progress())
    trained = dict(model.named_parameters())
    base = tiny_unet()
    expert = LoraExpert(base.state_dict(), trained_factors(trained, SPEC))
    rebuilt = tiny_unet(seed=5)
    rebuilt.load_state_dict(expert.tensors())
    torch.testing.assert_close(predict(rebuilt), predict(model.eval()), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(predict(rebuilt), predict(base), atol=1e-4)


def test_factors_come_back_from_their_file(tmp_path: Path) -> None:
    factors = random_factors(tiny_unet(), seed=1)
    write_factors(tmp_path / "lora.safetensors", factors, part="unet", base_digest="abc")
    read = read_factors(tmp_path / "lora.safetensors", part="unet")
    assert read.keys() == factors.keys()
    assert all(same_bits(read[layer].product(), each.product()) for layer, each in factors.items())
    with pytest.raises(ModelFolderError, match="no LoRA factor of the transformer"):
        read_factors(tmp_path / "lora.safetensors", part="transformer")
    with pytest.raises(ModelFolderError, match=r"none\.safetensors is missing"):
        read_factors(tmp_path / "none.safetensors", part="unet")
    save_tensors(tmp_path / "half.safetensors", {"unet.conv_in.lora_A.weight": torch.zeros(2, 4)})
    with pytest.raises(ModelFolderError, match="does not hold both LoRA factors of conv_in"):
        read_factors(tmp_path / "half.safetensors", part="unet")
    ranks = {"unet.conv_in.lora_A.weight": torch.zeros(2, 4), "unet.conv_in.lora_B.weight": torch.zeros(4, 3)}
    save_tensors(tmp_path / "ranks.safetensors", ranks)
    with pytest.raises(ModelFolderError, match="both LoRA factors of conv_in, of one rank"):
        read_factors(tmp_path / "ranks.safetensors", part="unet")


@pytest.fixture
def merge_parts(tmp_path: Path) -> tuple[Checkpoint, list[LoraExpert]]:
    model = tiny_unet()
    save_tensors(tmp_path / "pretrained", model.state_dict())
    base = Checkpoint(tmp_path / "pretrained")
    return base, [LoraExpert(base, random_factors(model, seed=seed)) for seed in (1, 2)]


def test_a_merge_is_the_explicit_sum_and_leaves_the_rest_alone(
    tmp_path: Path, merge_parts: tuple[Checkpoint, list[LoraExpert]]
) -> None:
    base, experts = merge_parts
    merge_checkpoints(base, dict(zip("ab", experts, strict=True)), TaskArithmetic((0.3, 0.5)), tmp_path / "merged")
    merged = Checkpoint(tmp_path / "merged")
    assert set(merged) == set(base)
    changed = {name for name in base if experts[0].changes(name)}
    assert {"mid_block.attentions.0.to_q.weight", "mid_block.resnets.0.conv1.weight"} < changed
    for name in base:
        if name not in changed:
            assert same_bits(merged[name], base[name]), name
            continue
        first, second = (expert.factors[name] for expert in experts)
        expected = by_hand(torch.from_numpy(by_hand(base[name], first, 0.3)), second, 0.5)
        np.testing.assert_allclose(merged[name].numpy(), expected, atol=1e-6)


METHODS = [
    TaskArithmetic((0.3, 0.5)),
    TaskArithmetic((0.0, 0.0)),
    Average(),
    Ties((0.4, 0.4), 0.5),
    Dare((0.3, 0.3), 0.5, 0),
]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_adapters_as_it_would_whole_copies(
    tmp_path: Path, merge_parts: tuple[Checkpoint, list[LoraExpert]], method: TensorMerge
) -> None:
    base, experts = merge_parts
    merge_checkpoints(base, dict(zip("ab", experts, strict=True)), method, tmp_path / "merged")
    for index, expert in enumerate(experts):
        save_tensors(tmp_path / f"{index}", expert.tensors())
    copies = {name: Checkpoint(tmp_path / name) for name in "01"}
    merge_checkpoints(base, copies, method, tmp_path / "expected")
    merged, expected = Checkpoint(tmp_path / "merged"), Checkpoint(tmp_path / "expected")
    assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in base)

    model = tiny_unet()
    live = LiveMerge(model, experts)
    live.apply(method)
    assert all(torch.allclose(tensor, merged[name], atol=1e-6) for name, tensor in model.state_dict().items())


def test_adapters_of_different_layers_are_merged_each_where_it_is() -> None:
    model = tiny_unet()
    base = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    specs = [LoraSpec(rank=2, target_modules=(target,)) for target in ("to_q", "to_k")]
    experts = [LoraExpert(base, random_factors(model, spec, seed=seed)) for seed, spec in enumerate(specs)]
    for name, tensor in merged_tensors(base, experts, TaskArithmetic((1.0, 1.0))):
        expected = base[name] + sum(expert[name] - base[name] for expert in experts)
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_a_live_merge_keeps_of_the_model_what_adapters_change(merge_parts: tuple[Checkpoint, list[LoraExpert]]) -> None:
    _, experts = merge_parts
    model = tiny_unet()
    live = LiveMerge(model, experts)
    kept = {
        name for name, tensor in model.state_dict().items() if tensor.data_ptr() != live._pretrained[name].data_ptr()
    }
    assert kept == set(experts[0].factors)
    original = predict(model)
    live.apply(TaskArithmetic((1.0, 0.0)))
    assert not predict(model).equal(original)
    live.apply(TaskArithmetic((0.0, 0.0)))
    assert predict(model).equal(original)


def test_the_ensemble_wears_each_adapter_on_its_own_timesteps(merge_parts: tuple[Checkpoint, list[LoraExpert]]) -> None:
    _, experts = merge_parts
    segments = [TimestepSegment(0, 400), TimestepSegment(400, 1000)]
    copies = [tiny_unet(), tiny_unet()]
    for model, expert in zip(copies, experts, strict=True):
        model.load_state_dict(expert.tensors())
    whole, light = Ensemble(segments, copies), LoraEnsemble(tiny_unet(), segments, experts)
    for timestep in (999, 400, 399, 0, 700):
        assert predict(light.model_at(timestep)).equal(predict(whole.model_at(timestep)))
    with pytest.raises(ValueError, match="timestep 1000 is in none"):
        light.model_at(1000)


def test_the_sum_of_adapters_is_exact_and_of_the_summed_rank() -> None:
    model = tiny_unet()
    experts = [random_factors(model, seed=seed) for seed in (1, 2, 3)]
    blocks = block_names(model.state_dict())
    block_weights = BlockWeights(tuple(tuple(0.1 * (i + b) for b in range(len(blocks))) for i in range(3)), blocks)
    for method, weights in (
        (TaskArithmetic((0.3, 0.0, -0.5)), lambda _: (0.3, 0.0, -0.5)),
        (Average(), lambda _: (1 / 3,) * 3),
        (block_weights, lambda layer: [0.1 * (i + blocks.index(layer)) for i in range(3)]),
    ):
        summed = sum_adapters(experts, method)
        for layer in ("mid_block.attentions.0.to_q", "mid_block.resnets.0.conv1"):
            expected = sum(w * e[layer].product() for w, e in zip(weights("mid"), experts, strict=True))
            torch.testing.assert_close(summed[layer].product(), expected, atol=1e-6, rtol=1e-5)
            assert summed[layer].rank == 9


def test_what_is_no_sum_is_refused() -> None:
    experts = [random_factors(tiny_unet(), seed=seed) for seed in (1, 2)]
    for method in (Ties((0.4, 0.4), 0.5), Dare((0.3, 0.3), 0.5, 0)):
        with pytest.raises(InputError, match="no weighted sum of the adapters; give a rank"):
            sum_adapters(experts, method)
    with pytest.raises(InputError, match="there is no adapter; it is the pretrained model"):
        sum_adapters([], TaskArithmetic(()))


@pytest.mark.parametrize("rank", [1, 2, 4, 6, 50])
def test_a_truncated_adapter_is_numpys_truncated_svd(rank: int) -> None:
    experts = [random_factors(tiny_unet(), seed=seed) for seed in (1, 2)]
    summed = sum_adapters(experts, TaskArithmetic((0.3, 0.5)))
    found = truncate(summed, rank)
    dense = truncate_difference(((layer, each.product()) for layer, each in summed.items()), rank)
    lost, total = 0.0, 0.0
    for layer, each in summed.items():
        product = each.product().double().numpy()
        u, s, vh = np.linalg.svd(product.reshape(len(product), -1), full_matrices=False)
        nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert found.factors[layer].rank == rank
        for way in (found, dense):
            np.testing.assert_allclose(way.factors[layer].product().numpy(), nearest.reshape(product.shape), atol=1e-5)
            expected = np.linalg.norm(product.reshape(nearest.shape) - nearest) / np.linalg.norm(product)
            assert way.errors[layer] == pytest.approx(expected, abs=1e-6)
        lost, total = lost + (s[rank:] ** 2).sum(), total + (s**2).sum()
    assert found.error == pytest.approx((lost / total) ** 0.5, abs=1e-7)
    assert (found.error > 0.01) == (rank < 6)


def test_an_adapter_of_zeros_has_no_error() -> None:
    factors = random_factors(tiny_unet(), seed=1)
    found = truncate(sum_adapters([factors], TaskArithmetic((0.0,))), 2)
    assert found.error == 0.0
    assert set(found.errors.values()) == {0.0}
    assert all(not each.product().any() for each in found.factors.values())


def test_factors_of_other_layers_are_refused() -> None:
    with pytest.raises(ModelFolderError, match=r"factors for nowhere\.weight \(4, 4\), which the"):
        LoraExpert(tiny_unet().state_dict(), {"nowhere": LoraFactors(torch.zeros(2, 4), torch.zeros(4, 2))})


def test_targets_must_be_layers_of_the_model() -> None:
    with pytest.raises(InputError, match=r"to_qq is no layer of a UNet2DModel; it has, for example, conv_in"):
        attach_lora(tiny_unet(), LoraSpec(target_modules=("to_q", "to_qq")), seed=0)
    with pytest.raises(InputError, match=r"o_q is no layer"):
        attach_lora(tiny_unet(), LoraSpec(target_modules=("o_q",)), seed=0)
    with pytest.raises(InputError, match=r"attentions\.0 is of class Attention; an adapter goes to linear"):
        attach_lora(tiny_unet(), LoraSpec(target_modules=("attentions.0",)), seed=0)
    without = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False}
    with pytest.raises(InputError, match=r"no attention; set finetune\.lora\.target_modules to some of"):
        attach_lora(tiny_unet(**without), LoraSpec(), seed=0)


def test_projections_and_adapters_exclude_each_other() -> None:
    assert FinetuneSpec(num_steps=1).channel_projection
    assert not FinetuneSpec.model_validate({"num_steps": 1, "lora": {"rank": 4}}).channel_projection
    with pytest.raises(ValidationError, match=r"lora and channel_projection exclude each other"):
        FinetuneSpec.model_validate({"num_steps": 1, "lora": {"rank": 4}, "channel_projection": True})


def test_a_recipe_without_an_adapter_keeps_its_digest() -> None:
    assert "lora" not in FinetuneSpec(num_steps=1).model_dump()
    spec = FinetuneSpec.model_validate({"num_steps": 1, "lora": {"rank": 4}})
    assert FinetuneSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_the_scale_is_alpha_over_rank() -> None:
    assert LoraSpec(rank=8).scale == 1.0
    assert LoraSpec(rank=8, alpha=4).scale == 0.5
    assert LoraSpec(rank=8, alpha=4).times(3) == LoraSpec(rank=24, alpha=12)
    assert LoraSpec(rank=8).times(3) == LoraSpec(rank=24)
