from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.merge_utils import ties as peft_ties
from torch import nn

from deme_core.errors import InputError
from deme_core.merge import merged_tensors
from deme_core.merge_methods import METHODS, Average, BlockWeights, Dare, TaskArithmetic, TensorMerge, Ties
from deme_core.merge_methods.block_weights import block_names, block_of, num_levels, transformer_depth
from deme_core.merge_methods.build import build_method
from deme_core.merge_methods.ties import trim
from deme_core.projection import attach_projections
from deme_core.recipe import MethodSpec, PretrainedSpec
from tests.tiny_models import randomize, same_bits, tiny_conditional_unet, tiny_unet

NAME = "conv_in.weight"
WEIGHTED = ["task_arithmetic", "block_weights", "ties", "dare"]


def random_tensors(num_experts: int, size: int = 200) -> tuple[torch.Tensor, list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    pretrained, *experts = (torch.randn(size, generator=rng) for _ in range(num_experts + 1))
    return pretrained, experts


def method(kind: str, weights: tuple[float, ...]) -> TensorMerge:
    settings: dict[str, dict[str, Any]] = {"ties": {"density": 0.3}, "dare": {"drop_rate": 0.5, "seed": 0}}
    if kind == "average":
        return Average()
    if kind == "block_weights":
        return BlockWeights(tuple((weight,) for weight in weights), ("rest",))
    return METHODS[kind](weights, **settings.get(kind, {}))


@pytest.mark.parametrize("kind", WEIGHTED)
def test_zero_weights_give_the_pretrained_tensor_bit_for_bit(kind: str) -> None:
    pretrained, experts = random_tensors(2)
    pretrained[:2] = torch.tensor([-0.0, 1e-42])
    assert same_bits(method(kind, (0.0, 0.0))(NAME, pretrained, experts), pretrained)


@pytest.mark.parametrize("kind", ["task_arithmetic", "block_weights", "average"])
def test_one_expert_at_weight_one_is_that_expert_bit_for_bit(kind: str) -> None:
    pretrained, experts = random_tensors(1)
    experts[0][:2] = torch.tensor([-0.0, 1e-42])
    assert same_bits(method(kind, (1.0,))(NAME, pretrained, experts), experts[0])


@pytest.mark.parametrize("kind", ["task_arithmetic", "block_weights", "ties", "average"])
@given(order=st.permutations(range(4)))
def test_the_order_of_experts_does_not_matter(kind: str, order: list[int]) -> None:
    pretrained, experts = random_tensors(4)
    weights = (0.1, 0.2, 0.7, -0.4)
    permuted = method(kind, tuple(weights[i] for i in order))(NAME, pretrained, [experts[i] for i in order])
    torch.testing.assert_close(permuted, method(kind, weights)(NAME, pretrained, experts), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", METHODS)
def test_inputs_are_not_changed(kind: str) -> None:
    pretrained, experts = random_tensors(2)
    before = [tensor.clone() for tensor in (pretrained, *experts)]
    for weights in ((0.3, 0.3), (1.0, 0.0), (0.0, 0.0)):
        method(kind, weights)(NAME, pretrained, experts)
    assert all(same_bits(left, right) for left, right in zip((pretrained, *experts), before, strict=True))


@pytest.mark.parametrize("kind", METHODS)
def test_bfloat16_is_merged_in_float32(kind: str) -> None:
    pretrained, experts = random_tensors(2)
    pretrained, experts = pretrained.bfloat16(), [expert.bfloat16() for expert in experts]
    merged = method(kind, (0.3, 0.4))(NAME, pretrained, experts)
    expected = method(kind, (0.3, 0.4))(NAME, pretrained.float(), [expert.float() for expert in experts])
    assert same_bits(merged, expected)
    assert merged.dtype == torch.float32


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_tensors_that_are_no_floats_are_kept(kind: str, dtype: torch.dtype) -> None:
    pretrained, expert = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 0, 1]).to(dtype)
    assert same_bits(method(kind, (1.0,))(NAME, pretrained, [expert]), pretrained)


@pytest.mark.parametrize("kind", WEIGHTED)
@pytest.mark.parametrize("num_experts", [1, 3])
def test_there_is_one_weight_per_expert(kind: str, num_experts: int) -> None:
    pretrained, experts = random_tensors(num_experts)
    with pytest.raises(InputError, match=f"2 merge weights were given for {num_experts} experts"):
        method(kind, (0.5, 0.5))(NAME, pretrained, experts)


def test_the_average_of_no_experts_is_refused() -> None:
    with pytest.raises(InputError, match="give at least one"):
        Average()(NAME, torch.ones(3), [])


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(InputError, match="density must be greater than 0 and at most 1"):
        Ties((0.5,), density)


@pytest.mark.parametrize("drop_rate", [1.0, -0.1, float("nan")])
def test_a_drop_rate_out_of_range_is_refused(drop_rate: float) -> None:
    with pytest.raises(InputError, match="drop_rate must be at least 0 and less than 1"):
        Dare((0.5,), drop_rate, 0)


def test_the_average_is_task_arithmetic_with_equal_weights() -> None:
    pretrained, experts = random_tensors(3)
    expected = TaskArithmetic((1 / 3,) * 3)(NAME, pretrained, experts)
    torch.testing.assert_close(Average()(NAME, pretrained, experts), expected, atol=1e-6, rtol=1e-6)


def test_ties_by_hand() -> None:
    # density 0.6 keeps three of five entries. Trimmed: (4, -3, 0, 2, 0), (-1, -5, 0, 2, 0) and (0, 1, 6, -7, 0).
    # Their sums 3, -7, 6, -3, 0 elect +, -, +, -, none; the disjoint means are 4, (-3 - 5) / 2, 6, -7, 0.
    pretrained = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    task_vectors = torch.tensor(
        [[4.0, -3.0, 1.0, 2.0, 0.5], [-1.0, -5.0, 0.5, 2.0, 0.0], [0.1, 1.0, 6.0, -7.0, 0.2]],
    )
    merged = Ties((0.5, 0.5, 0.5), 0.6)(NAME, pretrained, list(pretrained + task_vectors))
    torch.testing.assert_close(merged, pretrained + 0.5 * torch.tensor([4.0, -4.0, 6.0, -7.0, 0.0]))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.95])
def test_ties_is_that_of_peft(density: float) -> None:
    # Its disjoint mean divides by the number of experts that agree, which is ours while all weights are one.
    pretrained, experts = random_tensors(3)
    expected = pretrained + peft_ties([expert - pretrained for expert in experts], torch.ones(3), density)
    torch.testing.assert_close(Ties((1.0,) * 3, density)(NAME, pretrained, experts), expected)


def test_ties_weighs_votes_and_values() -> None:
    # Weighted: (0.4, -0.8) and (-0.3, -0.2); the first entry elects +, the second -; mean |w| = 0.25.
    pretrained = torch.zeros(2)
    merged = Ties((0.4, 0.1), 1.0)(NAME, pretrained, [torch.tensor([1.0, -2.0]), torch.tensor([-3.0, -2.0])])
    torch.testing.assert_close(merged, 0.25 * torch.tensor([0.4 / 0.4, -1.0 / 0.5]))


@given(weights=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=4))
def test_ties_of_experts_that_agree_is_task_arithmetic_with_weights_over_n(weights: list[float]) -> None:
    pretrained, experts = random_tensors(len(weights))
    experts = [pretrained + expert.abs() * pretrained.sign() for expert in experts]
    merged = Ties(tuple(weights), 1.0)(NAME, pretrained, experts)
    expected = TaskArithmetic(tuple(weight / len(weights) for weight in weights))(NAME, pretrained, experts)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-5)


def test_an_expert_fades_out_of_ties_as_its_weight_goes_to_zero() -> None:
    pretrained, experts = random_tensors(2)
    faded = Ties((1.0, 0.0), 0.5)(NAME, pretrained, experts)
    # Where only the second expert is left by trimming it wins the election with any weight, and has a full say.
    voted = trim(experts[0] - pretrained, 0.5) != 0
    nearly = Ties((1.0, 1e-6), 0.5)(NAME, pretrained, experts)
    torch.testing.assert_close(nearly[voted], faded[voted], atol=1e-4, rtol=1e-4)


@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, 1.0, 2.0, 3.0]), min_size=1, max_size=30),
    density=st.floats(0.01, 1.0),
)
def test_trimming_keeps_exactly_k_of_the_largest_the_first_of_equals(values: list[float], density: float) -> None:
    vector = torch.tensor(values)
    num_kept = round(density * len(values))
    kept = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:num_kept]
    expected = torch.zeros_like(vector)
    expected[kept] = vector[kept]
    assert trim(vector, density).equal(expected)


@pytest.mark.parametrize("weights", [(0.3, 0.3), (1.0, 0.0), (-0.5, 2.0)])
def test_dare_without_dropping_is_task_arithmetic_bit_for_bit(weights: tuple[float, ...]) -> None:
    pretrained, experts = random_tensors(2)
    merged = Dare(weights, 0.0, 3)(NAME, pretrained, experts)
    assert same_bits(merged, TaskArithmetic(weights)(NAME, pretrained, experts))


def test_dare_expects_what_task_arithmetic_gives() -> None:
    pretrained, experts = random_tensors(2, size=50)
    weights, num_seeds = (0.4, 0.6), 1000
    merges = torch.stack([Dare(weights, 0.5, seed)(NAME, pretrained, experts) for seed in range(num_seeds)])
    vectors = [weight * (expert - pretrained) for weight, expert in zip(weights, experts, strict=True)]
    # An entry's variance is p / (1 - p) sum_i (w_i tau_i)^2, p / (1 - p) being one; five standard errors bound all.
    error = sum(vector**2 for vector in vectors).sqrt() / num_seeds**0.5
    expected = TaskArithmetic(weights)(NAME, pretrained, experts)
    assert bool(((merges.mean(0) - expected).abs() < 5 * error + 1e-5).all())


def test_dare_drops_the_share_it_was_told_to() -> None:
    merged = Dare((1.0,), 0.8, 0)(NAME, torch.zeros(20_000), [torch.ones(20_000)])
    kept = merged != 0
    torch.testing.assert_close(merged[kept], torch.full((int(kept.sum()),), 5.0))
    assert abs(kept.float().mean().item() - 0.2) < 0.02


def test_a_mask_of_dare_depends_on_seed_expert_and_name_alone() -> None:
    zeros, ones = torch.zeros(1000), torch.ones(1000)
    dare = Dare((1.0, 0.0), 0.5, 0)
    first = dare("a", zeros, [ones, ones])
    dare("b", zeros, [ones, ones])
    torch.rand(3)
    assert same_bits(dare("a", zeros, [ones, ones]), first)
    assert not first.equal(dare("b", zeros, [ones, ones]))
    assert not first.equal(Dare((1.0, 0.0), 0.5, 1)("a", zeros, [ones, ones]))
    assert not first.equal(Dare((0.0, 1.0), 0.5, 0)("a", zeros, [ones, ones]))


def test_block_weights_that_are_equal_in_all_blocks_are_task_arithmetic() -> None:
    pretrained = tiny_unet().state_dict()
    models = [tiny_unet() for _ in range(2)]
    for seed, model in enumerate(models, start=1):
        attach_projections(model)
        randomize(model, seed=seed)
    experts, weights = [model.state_dict() for model in models], (0.3, 0.5)
    blocks = block_names(pretrained)
    merge = BlockWeights(tuple((weight,) * len(blocks) for weight in weights), blocks)
    expected = dict(merged_tensors(pretrained, experts, TaskArithmetic(weights)))
    found = dict(merged_tensors(pretrained, experts, merge))
    assert found.keys() == expected.keys() == pretrained.keys()
    assert [name for name, tensor in found.items() if not same_bits(tensor, expected[name])] == []


def test_each_block_is_merged_with_its_own_weights() -> None:
    merge = BlockWeights(((0.25, 1.0, 0.5), (0.5, 0.0, 0.5)), ("level 0", "level 1", "mid"))
    experts = [torch.full((2,), 4.0), torch.full((2,), 8.0)]
    for name, value in {"down_blocks.0.w": 5.0, "up_blocks.1.w": 5.0, "up_blocks.0.w": 4.0, "mid_block.w": 6.0}.items():
        assert merge(name, torch.zeros(2), experts).tolist() == [value, value], name
    with pytest.raises(InputError, match=r"conv_in\.weight is of block rest, which has no merge weights"):
        merge(NAME, torch.zeros(2), experts)


def test_weights_of_blocks_are_given_expert_by_expert() -> None:
    merge = build_method(
        MethodSpec(method="block_weights"), [0.1, 0.2, 0.3, 0.4], 2, ["down_blocks.0.w", "mid_block.w"]
    )
    assert merge == BlockWeights(((0.1, 0.2), (0.3, 0.4)), ("level 0", "mid"))


def test_every_expert_has_a_weight_for_every_block() -> None:
    with pytest.raises(InputError, match="1 merge weights were given for 2 blocks"):
        BlockWeights(((0.5,),), ("level 0", "mid"))


def blocks_by_name(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    levels, depth = num_levels(names), transformer_depth(names)
    return {name: block_of(name, num_levels=levels, depth=depth) for name in names}


@pytest.mark.parametrize("model", [tiny_unet, tiny_conditional_unet])
def test_the_blocks_of_a_unet_are_its_resolutions(model: Callable[[], nn.Module]) -> None:
    blocks = blocks_by_name(model().state_dict())
    assert block_names(blocks) == ("level 0", "level 1", "mid", "rest")
    assert blocks["down_blocks.0.resnets.0.conv1.weight"] == blocks["up_blocks.1.resnets.0.conv1.weight"] == "level 0"
    assert blocks["down_blocks.1.resnets.0.conv1.weight"] == blocks["up_blocks.0.resnets.0.conv1.weight"] == "level 1"
    assert blocks["mid_block.resnets.0.conv1.weight"] == "mid"
    rest = {name.split(".")[0] for name, block in blocks.items() if block == "rest"}
    assert rest == {"conv_in", "conv_out", "time_embedding", "conv_norm_out"}


def test_transformer_blocks_inside_of_a_unet_belong_to_their_level() -> None:
    blocks = blocks_by_name(tiny_conditional_unet().state_dict())
    assert {(name.split(".")[0], block) for name, block in blocks.items() if ".transformer_blocks." in name} == {
        ("down_blocks", "level 0"),
        ("up_blocks", "level 0"),
        ("mid_block", "mid"),
    }


@pytest.mark.parametrize("blocks", ["transformer_blocks", "blocks"])
def test_the_blocks_of_a_transformer_are_quarters_of_its_depth(blocks: str) -> None:
    names = [f"{blocks}.{k}.attn1.to_q.weight" for k in range(8)] + ["pos_embed.proj.weight"]
    expected = [f"depth {k}" for k in (0, 0, 1, 1, 2, 2, 3, 3)] + ["rest"]
    assert list(blocks_by_name(names).values()) == expected
    merge = BlockWeights(((0.0, 0.0, 1.0, 0.0, 0.0),), block_names(names), transformer_depth(names))
    merged = [merge(name, torch.zeros(1), [torch.ones(1)]).item() for name in names]
    assert merged == [float(block == "depth 2") for block in expected]


def test_single_transformer_blocks_come_after_the_others() -> None:
    names = [f"transformer_blocks.{k}.w" for k in range(2)] + [f"single_transformer_blocks.{k}.w" for k in range(6)]
    assert list(blocks_by_name(names).values()) == [f"depth {k}" for k in (0, 0, 1, 1, 2, 2, 3, 3)]


def test_weights_for_a_transformer_need_its_depth() -> None:
    with pytest.raises(InputError, match="give the numbers of its transformer blocks"):
        BlockWeights(((0.5,),), ("depth 0",))


def test_a_recipe_names_the_methods_of_the_registry() -> None:
    assert get_args(MethodSpec.model_fields["method"].annotation) == (*METHODS, "regmean")  # A stage of its own


SMALL = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
}


@pytest.mark.parametrize("unet", [{}, SMALL, SMALL | {"mid_block_type": None}])
def test_a_recipe_counts_the_blocks_of_its_model_before_there_is_one(unet: dict[str, Any]) -> None:
    spec = PretrainedSpec.model_validate({"source": "pretrain", "unet": unet, "training": {"num_steps": 1}})
    with torch.device("meta"):
        model = UNet2DModel(sample_size=8, **unet)
    assert spec.num_blocks == len(block_names(model.state_dict()))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare", "average"])
def test_the_settings_that_name_a_merge_are_all_that_its_method_has(method: Any) -> None:
    own = {field.name for field in fields(METHODS[method])} - {"weights"}  # type: ignore[arg-type]
    assert set(MethodSpec(method=method).settings()) == own | {"method"}
