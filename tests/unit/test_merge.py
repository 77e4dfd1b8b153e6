from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from deme_core.checkpoint import Checkpoint, TensorInfo, save_tensors, tensor_infos
from deme_core.errors import IncompatibleCheckpointsError, InputError
from deme_core.merge import check_experts, merge_checkpoints, merged_tensors, one_thread
from deme_core.merge_methods import TaskArithmetic
from deme_core.merge_methods.build import build_method
from deme_core.projection import attach_projections
from deme_core.recipe import MethodSpec
from tests.tiny_models import predict, randomize, randomize_projections, same_bits, tiny_unet

Tensors = dict[str, torch.Tensor]


def model_tensors(seed: int, *, projections: bool = False) -> Tensors:
    model = tiny_unet()
    if projections:
        attach_projections(model)
    if seed:
        randomize(model, seed=seed)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def explicit_merge(pretrained: Tensors, experts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """METHOD section 2, in float64: W and P merged as task vectors, then W <- P W and b <- P b."""
    merged = {}
    for name in experts[0] if experts else pretrained:
        start = pretrained[name] if name in pretrained else torch.eye(len(experts[0][name]))
        vectors = [expert[name].double() - start.double() for expert in experts]
        merged[name] = start.double() + sum(w * tau for w, tau in zip(weights, vectors, strict=True))
    for name in pretrained:
        projection = f"{name.rsplit('.', 1)[0]}.channel_projection"
        if projection in merged:
            merged[name] = torch.einsum("ij,j...->i...", merged[projection], merged[name])
    return {name: merged[name] for name in pretrained}


def saved(path: Path, tensors: Tensors) -> Checkpoint:
    save_tensors(path, tensors)
    return Checkpoint(path)


def assert_same(merged: Iterable[tuple[str, torch.Tensor]], expected: Mapping[str, torch.Tensor]) -> None:
    found = dict(merged)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not same_bits(tensor, expected[name])] == []


@pytest.mark.parametrize("projections", [False, True])
def test_all_weights_zero_give_the_pretrained_model_bit_for_bit(projections: bool) -> None:
    pretrained = model_tensors(0)
    pretrained["conv_in.weight"].view(-1)[:2] = torch.tensor([-0.0, 1e-42])
    pretrained["mid_block.resnets.0.conv2.weight"].view(-1)[0] = -0.0
    experts = [model_tensors(seed, projections=projections) for seed in (1, 2)]
    assert_same(merged_tensors(pretrained, experts, TaskArithmetic((0.0, 0.0))), pretrained)


def test_one_expert_at_weight_one_is_that_expert_bit_for_bit() -> None:
    pretrained, expert = model_tensors(0), model_tensors(1)
    expert["conv_in.weight"].view(-1)[:2] = torch.tensor([-0.0, 1e-42])
    assert_same(merged_tensors(pretrained, [expert], TaskArithmetic((1.0,))), expert)


def test_weights_that_choose_one_of_several_experts_give_it_bit_for_bit() -> None:
    experts = [model_tensors(seed) for seed in (1, 2, 3)]
    assert_same(merged_tensors(model_tensors(0), experts, TaskArithmetic((0.0, 1.0, 0.0))), experts[1])


@pytest.mark.parametrize("projections", [False, True])
@pytest.mark.parametrize("weights", [(0.1, 0.1, 0.5), (1.0, 1.0, 1.0), (0.5, 0.25, 0.25), (-0.5, 2.0, 0.0)])
def test_the_merge_equals_the_explicit_formula(weights: tuple[float, ...], projections: bool) -> None:
    pretrained = model_tensors(0)
    experts = [model_tensors(seed, projections=projections) for seed in (1, 2, 3)]
    merged = dict(merged_tensors(pretrained, experts, TaskArithmetic(tuple(weights))))
    expected = explicit_merge(pretrained, experts, weights)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name].double(), tensor, atol=1e-5, rtol=1e-5)


def test_merging_projections_first_is_not_merging_folded_experts() -> None:
    # The paper merges W and P as separate parameters; the test above would not see the difference without this one.
    pretrained, experts = model_tensors(0), [model_tensors(seed, projections=True) for seed in (1, 2)]
    name = "mid_block.resnets.0.conv2.weight"
    folded = [dict(merged_tensors(pretrained, [expert], TaskArithmetic((1.0,)))) for expert in experts]
    fold_first = dict(merged_tensors(pretrained, folded, TaskArithmetic((0.5, 0.5))))[name]
    merge_first = dict(merged_tensors(pretrained, experts, TaskArithmetic((0.5, 0.5))))[name]
    assert not torch.allclose(fold_first, merge_first, atol=1e-3)


@given(st.permutations(range(4)))
def test_the_order_of_segments_does_not_matter(order: list[int]) -> None:
    rng = torch.Generator().manual_seed(0)
    pretrained, *experts = (torch.randn(50, generator=rng) for _ in range(5))
    weights = [0.1, 0.2, 0.7, -0.4]
    permuted = TaskArithmetic(tuple(weights[i] for i in order))("w", pretrained, [experts[i] for i in order])
    torch.testing.assert_close(permuted, TaskArithmetic(tuple(weights))("w", pretrained, experts), atol=1e-6, rtol=1e-6)


def test_inputs_are_not_changed() -> None:
    pretrained, experts = model_tensors(0), [model_tensors(seed, projections=True) for seed in (1, 2)]
    before = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in (pretrained, *experts)]
    for weights in ([0.0, 0.0], [1.0, 0.0], [0.3, 0.3], [0.5, -0.5]):
        list(merged_tensors(pretrained, experts, TaskArithmetic(tuple(weights))))
    for tensors, copy in zip((pretrained, *experts), before, strict=True):
        assert all(same_bits(tensors[name], tensor) for name, tensor in copy.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_type_of_half_precision_cannot_hold_is_in_the_merge(dtype: torch.dtype, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    pretrained = {"w": torch.randn(2000, generator=rng).to(dtype)}
    experts = [{"w": pretrained["w"].float() + 1e-4 * torch.randn(2000, generator=rng)} for _ in range(4)]
    weights = (0.1, 0.1, 0.2, 0.5)
    checkpoints = {str(i): saved(tmp_path / f"{i}.safetensors", expert) for i, expert in enumerate(experts)}
    base = saved(tmp_path / "0th", pretrained)
    merge_checkpoints(base, checkpoints, TaskArithmetic(weights), tmp_path / "merged")
    merge_checkpoints(base, checkpoints, TaskArithmetic(weights), tmp_path / "half", dtype=dtype)

    merged, half = load_file(tmp_path / "merged")["w"], load_file(tmp_path / "half")["w"]
    exact = explicit_merge(pretrained, experts, weights)["w"]
    torch.testing.assert_close(merged.double(), exact, atol=1e-6, rtol=1e-6)
    assert (merged.dtype, half.dtype) == (torch.float32, dtype)
    # Rounding once errs by half of a step; merging in half precision errs by several.
    half_a_step = torch.finfo(dtype).eps / 2
    assert bool(((half.double() - exact).abs() <= exact.abs() * half_a_step * 1.001 + 1e-7).all())


def test_a_pretrained_model_of_float64_keeps_its_type(tmp_path: Path) -> None:
    tensors = {"w": torch.rand(3).double(), "n": torch.tensor([1, 2])}
    base = saved(tmp_path / "p", tensors)
    merge_checkpoints(base, {"e": base}, TaskArithmetic((0.5,)), tmp_path / "m")
    assert Checkpoint(tmp_path / "m").infos == base.infos


def test_experts_of_higher_precision_keep_it_until_the_end() -> None:
    rng = torch.Generator().manual_seed(0)
    pretrained, *experts = (torch.randn(50, generator=rng) for _ in range(3))
    pretrained = pretrained.bfloat16()
    expected = 0.5 * pretrained.double() + 0.25 * experts[0].double() + 0.25 * experts[1].double()
    merged = TaskArithmetic((0.25, 0.25))("w", pretrained, experts)
    torch.testing.assert_close(merged.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_tensors_that_are_no_floats_are_kept(dtype: torch.dtype) -> None:
    pretrained, expert = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 0, 1]).to(dtype)
    assert same_bits(TaskArithmetic((1.0,))("w", pretrained, [expert]), pretrained)


def test_the_file_holds_the_names_of_the_pretrained_model_and_its_outputs(tmp_path: Path) -> None:
    pretrained = saved(tmp_path / "p", model_tensors(0))
    model = tiny_unet()
    attach_projections(model)
    randomize_projections(randomize(model, seed=1), seed=2)
    expert = saved(tmp_path / "e", model.state_dict())

    merge_checkpoints(pretrained, {"expert 0": expert}, TaskArithmetic((1.0,)), tmp_path / "merged")

    assert Checkpoint(tmp_path / "merged").infos == pretrained.infos
    stock = tiny_unet()
    stock.load_state_dict(load_file(tmp_path / "merged"))
    torch.testing.assert_close(predict(stock), predict(model), atol=1e-5, rtol=1e-5)


def test_what_takes_one_thread_gives_the_others_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_refused_merge_writes_nothing(tmp_path: Path) -> None:
    pretrained = saved(tmp_path / "p", {"w": torch.ones(3)})
    expert = saved(tmp_path / "e", {"v": torch.ones(3)})
    with pytest.raises(IncompatibleCheckpointsError):
        merge_checkpoints(pretrained, {"e": expert}, TaskArithmetic((0.5,)), tmp_path / "merged")
    with pytest.raises(InputError):
        merge_checkpoints(pretrained, {"e": pretrained}, TaskArithmetic((0.5, 0.5)), tmp_path / "merged")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e", "p"]


def test_missing_extra_and_mis_shaped_tensors_of_an_expert_are_listed() -> None:
    pretrained = tensor_infos(model_tensors(0))
    expert = dict(pretrained)
    del expert["conv_in.bias"]
    expert["conv_out.weight"] = TensorInfo((1, 4, 3, 3), torch.float32)
    expert["head.weight"] = TensorInfo((1,), torch.float32)
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        check_experts(pretrained, {"expert 0": pretrained, "expert 1": expert})
    assert str(caught.value) == (
        "expert 1 does not hold the tensors of the pretrained model; missing tensors: conv_in.bias; "
        "extra tensors: head.weight; mis-shaped tensors: conv_out.weight (1, 4, 3, 3) for (1, 8, 3, 3)."
    )


def test_experts_have_all_the_same_projections_or_none() -> None:
    stock, projected = tensor_infos(model_tensors(0)), tensor_infos(model_tensors(0, projections=True))
    check_experts(stock, {"a": stock, "b": stock})
    check_experts(stock, {"a": projected, "b": projected})
    for experts in ({"a": projected, "b": stock}, {"b": stock, "a": projected}):
        with pytest.raises(IncompatibleCheckpointsError, match=r"^b does .* missing tensors: .*\.channel_projection"):
            check_experts(stock, experts)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mid_block.resnets.0.conv2.channel_projection", (8, 8)),
        ("mid_block.resnets.0.conv2.channel_projection", (16, 8)),
        ("nowhere.channel_projection", (16, 16)),
    ],
)
def test_a_projection_that_fits_no_layer_is_extra(name: str, shape: tuple[int, ...]) -> None:
    stock = tensor_infos(model_tensors(0))
    expert = stock | {name: TensorInfo(shape, torch.float32)}
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        check_experts(stock, {"a": expert})
    assert caught.value.extra == (name,)


@pytest.mark.parametrize(
    ("weights", "num_experts", "sentence"),
    [
        ([0.5], 2, "1 merge weights were given for 2 experts; give one for each."),
        ([0.5, 0.5, 0.5], 2, "3 merge weights were given for 2 experts; give one for each."),
        ([0.5, float("nan")], 2, r"Merge weights must be finite numbers, not \[0.5, nan\]."),
        ([float("-inf")], 1, r"Merge weights must be finite numbers, not \[-inf\]."),
    ],
)
def test_weights_must_be_finite_and_one_per_expert(weights: list[float], num_experts: int, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        build_method(MethodSpec(), weights, num_experts, [])


def test_finite_weights_of_any_sign_and_size_are_taken() -> None:
    assert build_method(MethodSpec(), [0.0, -2.0, 1e6], 3, []) == TaskArithmetic((0.0, -2.0, 1e6))
