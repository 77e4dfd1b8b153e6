import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deme_core.projection import (
    PARAMETER_NAME,
    attach_projections,
    fold_into,
    fold_projections,
    is_projection,
    projection_key,
)
from tests.tiny_models import (
    UNET_VARIANTS,
    predict,
    randomize_projections,
    same_bits,
    tiny_conditional_unet,
    tiny_images,
    tiny_unet,
)

# How diffusers names the layers that end a residual branch or change resolution, in every kind of block.
PROJECTED_NAME = re.compile(
    r".*(\.conv2|\.to_out\.0|\.ff\.net\.2|\.proj_out|\.(down|up)samplers\.\d\.conv|\.resnet_(down|up)\.conv2)"
)

CONDITIONAL_VARIANTS: dict[str, dict[str, Any]] = {
    "cross attention": {},
    "linear projection": {"use_linear_projection": True, "transformer_layers_per_block": 2},
    "simple cross attention": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
    },
}


def predict_conditionally(model: nn.Module) -> torch.Tensor:
    context = torch.randn((2, 5, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tiny_images(2, channels=4), torch.tensor([3, 700]), context).sample


BUILDS = {
    **{
        name: (lambda overrides=overrides: tiny_unet(**overrides), predict) for name, overrides in UNET_VARIANTS.items()
    },
    **{
        name: (lambda overrides=overrides: tiny_conditional_unet(**overrides), predict_conditionally)
        for name, overrides in CONDITIONAL_VARIANTS.items()
    },
}
every_architecture = pytest.mark.parametrize(("build", "run"), BUILDS.values(), ids=BUILDS.keys())


@every_architecture
def test_attaching_changes_no_output(build, run) -> None:
    model = build()
    before = run(model)
    attach_projections(model)
    torch.testing.assert_close(run(model), before, atol=1e-6, rtol=1e-6)


@every_architecture
def test_folded_projections_give_the_same_output_in_a_stock_model(build, run) -> None:
    model, stock = build(), build()
    attach_projections(model)
    randomize_projections(model)
    assert not torch.allclose(run(model), run(stock), atol=1e-3)

    stock.load_state_dict(fold_projections(model.state_dict()))

    torch.testing.assert_close(run(stock), run(model), atol=1e-5, rtol=1e-5)


@every_architecture
def test_every_end_of_a_residual_branch_and_change_of_resolution_has_a_projection(build, run) -> None:
    model = build()
    expected = {
        name for name, module in model.named_modules() if PROJECTED_NAME.fullmatch(name) and hasattr(module, "weight")
    }
    attached = attach_projections(model)
    assert len(attached) == len(set(attached))
    assert set(attached) == expected
    for block in ("mid_block", "down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"):
        assert any(name.startswith(f"{block}.") for name in attached)


@every_architecture
def test_every_projection_takes_part_in_the_output(build, run) -> None:
    model = build()
    attach_projections(model)
    inputs = (tiny_images(2, channels=4), torch.tensor([3, 700]), torch.randn(2, 5, 12))
    if run is predict:
        size, channels = model.config["sample_size"], model.config["in_channels"]
        inputs = (tiny_images(2, size=size, channels=channels), torch.tensor([3, 700]))
    model(*inputs).sample.square().sum().backward()
    for name, parameter in model.named_parameters():
        if is_projection(name):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@every_architecture
def test_stock_parameters_keep_their_names_and_values(build, run) -> None:
    stock, model = build().state_dict(), build()
    attached = attach_projections(model)
    state = model.state_dict()
    assert state.keys() - stock.keys() == {f"{name}.{PARAMETER_NAME}" for name in attached}
    assert all(same_bits(state[name], tensor) for name, tensor in stock.items())


@every_architecture
def test_folding_untouched_projections_keeps_every_bit(build, run) -> None:
    model = build()
    with torch.no_grad():
        model.conv_in.weight.view(-1)[0] = -0.0
        next(p for n, p in model.named_parameters() if n.endswith("conv2.weight")).view(-1)[0] = -0.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach_projections(model)
    folded = fold_projections(model.state_dict())
    assert folded.keys() == before.keys()
    assert all(same_bits(folded[name], tensor) for name, tensor in before.items())


def test_the_projections_of_a_unet_are_counted_by_its_parts() -> None:
    # 2 down, 2 mid and 4 up resnets; 1 down, 1 mid and 2 up attentions; 1 downsampler and 1 upsampler.
    assert len(attach_projections(tiny_unet())) == 8 + 4 + 2


def test_attaching_twice_is_refused() -> None:
    model = tiny_unet()
    attach_projections(model)
    with pytest.raises(ValueError, match="already has a channel projection"):
        attach_projections(model)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no layer that a channel projection could follow"):
        attach_projections(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_projections_have_the_dtype_of_their_layer(dtype: torch.dtype) -> None:
    model = tiny_unet().to(dtype)
    attach_projections(model)
    assert {p.dtype for name, p in model.named_parameters() if is_projection(name)} == {dtype}


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 3, 3)])
def test_folding_multiplies_from_the_left(shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    tensor, projection = torch.randn(shape, generator=rng), torch.randn((4, 4), generator=rng)
    expected = torch.einsum("ij,j...->i...", projection.double(), tensor.double())
    torch.testing.assert_close(fold_into(tensor, projection).double(), expected, atol=1e-6, rtol=1e-6)


def test_folding_changes_no_input_and_keeps_dtypes() -> None:
    tensors = {
        "a.weight": torch.randn(4, 3).bfloat16(),
        "a.bias": torch.randn(4).half(),
        f"a.{PARAMETER_NAME}": torch.randn(4, 4),
        "b.weight": torch.randn(2, 2),
        "steps": torch.tensor(3),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    folded = fold_projections(tensors)
    assert {name: tensor.dtype for name, tensor in folded.items()} == {
        "a.weight": torch.bfloat16,
        "a.bias": torch.float16,
        "b.weight": torch.float32,
        "steps": torch.int64,
    }
    assert all(same_bits(tensors[name], tensor) for name, tensor in before.items())


def test_a_projection_is_named_beside_the_weight_it_acts_on() -> None:
    assert projection_key("mid_block.resnets.0.conv2.bias") == "mid_block.resnets.0.conv2.channel_projection"
    assert is_projection("mid_block.resnets.0.conv2.channel_projection")
    assert not is_projection("mid_block.resnets.0.conv2.weight")


@pytest.mark.parametrize("num_images", [1, 40], ids=["acts on the output", "acts on the weight"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv with stride"])
def test_a_projected_layer_is_the_layer_and_then_the_projection(kind: str, bias: bool, num_images: int) -> None:
    torch.manual_seed(0)
    stride = 2 if kind == "conv with stride" else 1
    layer = nn.Linear(6, 5, bias=bias) if kind == "linear" else nn.Conv2d(6, 5, 3, stride, 1, bias=bias)
    plain = copy.deepcopy(layer)
    block = type("Transformer2DModel", (nn.Module,), {})()
    block.proj_out = layer
    attach_projections(nn.ModuleList([block]))
    projection = layer.get_parameter(PARAMETER_NAME)
    nn.init.normal_(projection)
    inputs = torch.randn((num_images, 6) if kind == "linear" else (num_images, 6, 4, 4))

    expected = torch.einsum("ij,bj...->bi...", projection, plain(inputs))
    output = layer(inputs)

    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), projection)
    (gradient,) = torch.autograd.grad(output.square().sum(), projection)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("num_images", [1, 40])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_projection_acts_where_it_costs_less(kind: str, num_images: int) -> None:
    layer = nn.Linear(6, 5, bias=False) if kind == "linear" else nn.Conv2d(6, 5, 3, padding=1, bias=False)
    inputs = torch.randn((num_images, 6) if kind == "linear" else (num_images, 6, 4, 4))
    num_inputs, num_outputs = layer.weight[0].numel(), num_images * (1 if kind == "linear" else 16)
    without = _flops(layer, inputs)
    block = type("Transformer2DModel", (nn.Module,), {})()
    block.proj_out = layer
    attach_projections(nn.ModuleList([block]))
    assert _flops(layer, inputs) - without == 2 * 5 * 5 * min(num_inputs, num_outputs)


def _flops(layer: nn.Module, inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(inputs)
    return counter.get_total_flops()
