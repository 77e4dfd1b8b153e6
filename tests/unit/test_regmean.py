from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deme_core.activation_grams import Grams, input_grams, linear_maps, num_features, share_of
from deme_core.images import load_images
from deme_core.manifest import ArtifactRef
from deme_core.recipe import DatasetSpec, RegMeanSpec
from deme_core.regmean import confine
from deme_core.segments import TimestepSegment
from flows.confinement import averaged_warning
from tasks.jobs import JobResult
from tests.tiny_models import randomize, tiny_adapter, tiny_unet

SEGMENTS = (TimestepSegment(0, 500), TimestepSegment(500, 1000))
GramsOf = Callable[..., Grams]


@pytest.fixture(scope="module")
def grams_of(tmp_path_factory: pytest.TempPathFactory) -> GramsOf:
    images = load_images(DatasetSpec(source="digits", num_images=40), cache=tmp_path_factory.mktemp("cache"))

    def measure(model: nn.Module, segment: TimestepSegment, **settings: int) -> Grams:
        sizes = {"num_images": 16, "max_features": 1000} | settings
        return input_grams(model, tiny_adapter(), images, segment=segment, **sizes)

    return measure


def regmean(pretrained: nn.Module, experts: list[nn.Module], grams: list[Grams], shrinkage: float) -> nn.Module:
    """theta_0 and the sum of all confined task vectors."""
    before = pretrained.state_dict()
    confined = [confine(before, e.state_dict(), i, grams, shrinkage=shrinkage) for i, e in enumerate(experts)]
    merged = tiny_unet()
    merged.load_state_dict({name: t + sum(c[name] - t for c in confined) for name, t in before.items()})
    return merged


@pytest.mark.parametrize("bias", [True, False])
def test_the_sum_of_confined_task_vectors_is_the_least_squares_fit(bias: bool) -> None:
    torch.manual_seed(0)
    theta_0, experts = nn.Linear(5, 3, bias=bias), [nn.Linear(5, 3, bias=bias) for _ in range(2)]
    inputs = [torch.randn(40, 5) * scale for scale in (torch.rand(5), torch.rand(5))]
    rows = [torch.cat([x, torch.ones(40, 1)], dim=1) if bias else x for x in inputs]
    grams: list[Grams] = [{"": x.T @ x / 40} for x in rows]
    # A map that is the whole model has the names weight and bias.
    before, after = ({f".{k}": v for k, v in m.state_dict().items()} for m in (theta_0, theta_0))
    for index, expert in enumerate(experts):
        tensors = {f".{k}": v for k, v in expert.state_dict().items()}
        moved = confine(before, tensors, index, grams, shrinkage=1.0)
        after = {k: after[k] + moved[k] - before[k] for k in after}

    # Independently: gradient zero of sum_i E|W x - W_i x|^2 + ridge |W - W_0|^2.
    def whole(tensors: dict[str, torch.Tensor], prefix: str = ".") -> torch.Tensor:
        weight = tensors[f"{prefix}weight"]
        return torch.cat([weight, tensors[f"{prefix}bias"][:, None]], dim=1) if bias else weight

    merged = whole(after).double().requires_grad_()
    ridge = 1e-3 * sum(g[""].diagonal().mean() for g in grams)
    loss = ridge * (merged - whole(before)).square().sum()
    for x, expert in zip(rows, experts, strict=True):
        loss = loss + ((x.double() @ (merged - whole(expert.state_dict(), "")).T).square().sum() / len(x))
    loss.backward()
    assert merged.grad is not None
    assert merged.grad.abs().max() < 1e-5 * whole(before).abs().max()


def test_grams_are_those_of_what_the_layers_are_given(grams_of: GramsOf) -> None:
    model = randomize(tiny_unet(), seed=1)
    seen: list[torch.Tensor] = []
    hook = model.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    gram = grams_of(model, SEGMENTS[0], positions_per_image=64)["conv_in"]
    hook.remove()
    patches = F.unfold(torch.cat(seen), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    patches = torch.cat([patches, torch.ones(len(patches), 1)], dim=1)
    torch.testing.assert_close(gram, patches.T @ patches / len(patches), rtol=1e-5, atol=1e-6)


def test_every_linear_map_has_a_gram_but_those_with_too_many_features(grams_of: GramsOf) -> None:
    model = tiny_unet()
    everything = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(grams_of(model, SEGMENTS[0])) == everything
    few = grams_of(model, SEGMENTS[0], max_features=80)
    assert set(few) == set(linear_maps(model, max_features=80)) < everything
    assert all(len(gram) <= 80 + 1 for gram in few.values())
    assert num_features(model.conv_in) == 9 + 1


def test_the_default_confines_what_its_description_names() -> None:
    widest = nn.Sequential(nn.Conv2d(512, 8, 3), nn.Conv2d(512, 8, 3, bias=False), nn.Conv2d(513, 8, 3))
    assert list(linear_maps(widest, max_features=RegMeanSpec().max_features)) == ["0", "1"]
    num = [sum(p.numel() for p in layer.parameters()) for layer in widest]
    assert share_of(["0", "1"], widest) == (num[0] + num[1]) / sum(num)


def test_inputs_differ_between_segments_and_repeat(grams_of: GramsOf) -> None:
    model = tiny_unet()
    low, again, high = (grams_of(model, segment) for segment in (SEGMENTS[0], SEGMENTS[0], SEGMENTS[1]))
    assert all(torch.equal(low[name], again[name]) for name in low)
    assert not torch.allclose(low["time_embedding.linear_1"], high["time_embedding.linear_1"])


def test_inputs_do_not_depend_on_the_batch_size(grams_of: GramsOf) -> None:
    model = randomize(tiny_unet(), seed=1)
    whole, parts = (grams_of(model, SEGMENTS[0], batch_size=size) for size in (16, 5))
    for name, gram in whole.items():
        torch.testing.assert_close(parts[name], gram, rtol=1e-4, atol=1e-5)


def test_positions_are_drawn_from_all_of_an_image(grams_of: GramsOf) -> None:
    # At the first positions, those of the upper edge, a third of each patch is padding.
    gram = grams_of(tiny_unet(), SEGMENTS[0], positions_per_image=4)["conv_in"]
    assert gram.diagonal().min() > 0.1


def test_images_are_drawn_from_all_of_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_images(DatasetSpec(source="digits", num_images=40), cache=tmp_path)
    taken: list[int] = []
    image = images.image
    monkeypatch.setattr(images, "image", lambda index: taken.append(index) or image(index))
    input_grams(tiny_unet(), tiny_adapter(), images, segment=SEGMENTS[0], num_images=16, max_features=80)
    assert len(set(taken)) == 16
    assert max(taken) >= 20


def test_tf32_is_off_while_inputs_are_measured(grams_of: GramsOf) -> None:
    model, seen = tiny_unet(), set()
    model.conv_in.register_forward_hook(lambda *_: seen.add(torch.backends.cudnn.allow_tf32))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        grams_of(model, SEGMENTS[0])
    assert seen == {False}


def test_equal_experts_are_kept_as_one_is(grams_of: GramsOf) -> None:
    pretrained, expert = tiny_unet(), randomize(tiny_unet(), seed=1, scale=0.02)
    grams = [grams_of(expert, segment) for segment in SEGMENTS]
    merged = regmean(pretrained, [expert, expert], grams, shrinkage=0.9).state_dict()
    before, after = pretrained.state_dict(), expert.state_dict()
    for name in before:
        # All of the change, but for what theta_0 pulls back where there is little input.
        assert (merged[name] - after[name]).norm() <= 0.2 * (after[name] - before[name]).norm() + 1e-6, name


def test_an_expert_keeps_what_it_does_to_its_own_inputs_and_loses_what_it_does_to_others() -> None:
    torch.manual_seed(0)
    theta_0, expert = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
    own, others = torch.zeros(4, 4), torch.zeros(4, 4)
    own[:2, :2], others[2:, 2:] = torch.eye(2), torch.eye(2)
    before, after = {".weight": theta_0.weight.data}, {".weight": expert.weight.data}
    confined = confine(before, after, 0, [{"": own}, {"": others}], shrinkage=1.0)
    torch.testing.assert_close(confined[".weight"][:, :2], expert.weight.data[:, :2], rtol=0, atol=2e-3)
    torch.testing.assert_close(confined[".weight"][:, 2:], theta_0.weight.data[:, 2:])


def test_what_is_no_measured_map_is_averaged(grams_of: GramsOf) -> None:
    pretrained, expert = tiny_unet(), randomize(tiny_unet(), seed=1)
    grams = [grams_of(expert, segment) for segment in SEGMENTS]
    confined = confine(pretrained.state_dict(), expert.state_dict(), 0, grams, shrinkage=0.9)
    name = "conv_norm_out.weight"
    expected = pretrained.state_dict()[name] + (expert.state_dict()[name] - pretrained.state_dict()[name]) / 2
    torch.testing.assert_close(confined[name], expected)
    assert confined.keys() == pretrained.state_dict().keys()


@pytest.mark.parametrize(("share", "is_told"), [(0.74, True), (0.999, False)])
def test_a_regmean_that_averages_much_of_the_model_is_warned_of(share: float, is_told: bool) -> None:
    grams = JobResult(ArtifactRef("file:///store/g", "g"), {"share_of_parameters": share}, False, 0.0, 0.0)
    warning = averaged_warning(grams, max_features=4608)
    assert (warning is not None) == is_told
    assert warning is None or ("74%" in warning and "4,608" in warning)
