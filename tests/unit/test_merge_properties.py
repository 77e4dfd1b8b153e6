"""Truths of merging that hold for all tensors and all weights."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from deme_core.merge_methods import Average, TaskArithmetic
from tests.tiny_models import same_bits

VALUES = st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, 1e-40])
WEIGHTS = st.floats(-2, 2).map(lambda w: round(w, 3))


@st.composite
def models(draw: st.DrawFn) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """theta_0 and its experts: one tensor each, in one dtype."""
    size, count = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tensors = [
        torch.tensor(draw(st.lists(VALUES, min_size=size, max_size=size)), dtype=dtype) for _ in range(count + 1)
    ]
    return tensors[0], tensors[1:]


def merge(pretrained: torch.Tensor, experts: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    before = [tensor.clone() for tensor in (pretrained, *experts)]
    merged = TaskArithmetic(tuple(weights))("a", pretrained, experts).clone()
    assert all(same_bits(left, right) for left, right in zip((pretrained, *experts), before, strict=True))
    return merged


@given(models())
def test_no_weight_gives_the_pretrained_model_and_a_whole_one_its_expert(
    drawn: tuple[torch.Tensor, list[torch.Tensor]],
) -> None:
    pretrained, experts = drawn
    assert same_bits(merge(pretrained, experts, [0.0] * len(experts)), pretrained.float())
    for index, expert in enumerate(experts):
        weights = [float(i == index) for i in range(len(experts))]
        assert same_bits(merge(pretrained, experts, weights), expert.float())


@given(models(), st.data())
def test_the_merge_is_linear_in_its_weights(
    drawn: tuple[torch.Tensor, list[torch.Tensor]], data: st.DataObject
) -> None:
    pretrained, experts = drawn
    one, two = (data.draw(st.lists(WEIGHTS, min_size=len(experts), max_size=len(experts))) for _ in range(2))
    both = merge(pretrained, experts, [a + b for a, b in zip(one, two, strict=True)])
    parts = merge(pretrained, experts, one) + merge(pretrained, experts, two) - pretrained.float()
    torch.testing.assert_close(both, parts, rtol=1e-4, atol=1e-2)


@given(models(), st.data())
def test_a_merge_of_permuted_experts_is_the_same_merge(
    drawn: tuple[torch.Tensor, list[torch.Tensor]], data: st.DataObject
) -> None:
    pretrained, experts = drawn
    weights = data.draw(st.lists(WEIGHTS, min_size=len(experts), max_size=len(experts)))
    order = data.draw(st.permutations(range(len(experts))))
    permuted = merge(pretrained, [experts[i] for i in order], [weights[i] for i in order])
    torch.testing.assert_close(permuted, merge(pretrained, experts, weights), rtol=1e-4, atol=1e-2)
    average = Average()("a", pretrained, experts)
    expected = merge(pretrained, experts, [1 / len(experts)] * len(experts))
    torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-2)
