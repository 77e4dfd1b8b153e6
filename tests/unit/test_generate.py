import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from deme_core.errors import InputError, NonFiniteImagesError
from deme_core.families import FAMILIES, Adapter, Unconditional
from deme_core.generate import Denoiser, Ensemble, SingleModel, generate, initial_noise, quantize
from deme_core.recipe import Precision, Sampler
from deme_core.sampling import Sampling
from deme_core.seeds import generator
from deme_core.segments import equal_segments
from tests.tiny_models import SCHEDULER_CONFIG, one_level_unet, tiny_adapter

SHAPE = (1, 8, 8)
SAMPLINGS = {
    "ddim": Sampling(num_inference_steps=4),
    "ddim, eta 1": Sampling(num_inference_steps=4, eta=1.0),
    "ddpm": Sampling(sampler="ddpm", num_inference_steps=4),
}
every_sampling = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())


def images(
    denoiser: Denoiser | nn.Module, sampling: Sampling, indices: Sequence[int] = range(7), seed: int = 1
) -> torch.Tensor:
    if isinstance(denoiser, nn.Module):
        denoiser = SingleModel(denoiser)
    made = generate(denoiser, tiny_adapter(), sampling, seed=seed, indices=indices)
    return torch.cat(list(made))


def assert_same_images(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but that sums in another order may turn a value between two grey levels: 1 level, 1 pixel in 100."""
    difference = (actual.int() - expected.int()).abs()
    assert actual.shape == expected.shape
    assert int(difference.max()) <= 1
    assert float((difference > 0).double().mean()) <= 0.01


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_under_autocast_only_the_denoiser_computes_in_half_precision(precision: Precision) -> None:
    model, sampling = one_level_unet(), SAMPLINGS["ddim"]
    seen = set()
    model.conv_in.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    half = images(model, replace(sampling, precision=precision))
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    difference = (half.int() - images(model, sampling).int()).abs()
    assert 0 < difference.double().mean() < 3
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("precision", "is_allowed"), [("fp32", False), ("bf16", True)])
def test_tf32_is_off_while_images_are_sampled_in_fp32(precision: Precision, is_allowed: bool) -> None:
    model, seen, before = one_level_unet(), set(), torch.backends.cudnn.allow_tf32
    model.conv_in.register_forward_hook(lambda *_: seen.add(torch.backends.cudnn.allow_tf32))
    torch.backends.cudnn.allow_tf32 = True
    try:
        sampling = replace(SAMPLINGS["ddim"], batch_size=2, precision=precision)
        for _ in generate(SingleModel(model), tiny_adapter(), sampling, seed=1, indices=range(4)):
            assert torch.backends.cudnn.allow_tf32, "whoever takes the images has its own setting"
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert seen == {is_allowed}


@every_sampling
@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_images_do_not_depend_on_the_batch_size(sampling: Sampling, batch_size: int) -> None:
    model = one_level_unet()
    whole = images(model, sampling)
    assert_same_images(images(model, replace(sampling, batch_size=batch_size)), whole)


@every_sampling
def test_any_part_of_a_set_equals_the_whole(sampling: Sampling) -> None:
    model = one_level_unet()
    whole = images(model, sampling)
    for indices in (range(3, 7), [5], [6, 0, 2]):
        assert_same_images(images(model, sampling, indices), whole[list(indices)])


@every_sampling
def test_seeds_and_indices_differ(sampling: Sampling) -> None:
    model = one_level_unet()
    both = torch.cat([images(model, sampling, range(3), seed=seed) for seed in (1, 2)])
    assert len({tuple(image.flatten().tolist()) for image in both}) == 6
    assert images(model, sampling, range(3), seed=1).equal(both[:3])


@every_sampling
@pytest.mark.parametrize("spacing", [None, "trailing"])
def test_images_equal_those_of_the_stock_pipeline(sampling: Sampling, spacing: str | None) -> None:
    model, indices = one_level_unet(), range(5)
    scheduler_class = DDPMScheduler if sampling.sampler == "ddpm" else DDIMScheduler
    overrides = {} if spacing is None else {"timestep_spacing": spacing}
    scheduler = scheduler_class.from_config(SCHEDULER_CONFIG, **overrides)
    settings = {"batch_size": 5, "num_inference_steps": 4, "output_type": "np"}
    settings["generator"] = [generator("image", 1, index) for index in indices]
    if sampling.sampler == "ddpm":
        pipeline = DDPMPipeline(model, scheduler)
    else:
        pipeline, settings["eta"] = DDIMPipeline(model, scheduler), sampling.eta
    pipeline.set_progress_bar_config(disable=True)
    stock = torch.from_numpy((pipeline(**settings).images * 255).round()).to(torch.uint8).permute(0, 3, 1, 2)

    assert images(model, replace(sampling, timestep_spacing=spacing), indices).equal(stock)


def test_every_setting_of_the_sampler_changes_the_images() -> None:
    model, base = one_level_unet(), SAMPLINGS["ddim"]
    settings = [{}, {"eta": 1.0}, {"num_inference_steps": 5}, {"timestep_spacing": "trailing"}, {"sampler": "ddpm"}]
    made = [tuple(images(model, replace(base, **each), [0]).flatten().tolist()) for each in settings]
    assert len(set(made)) == len(settings)


def test_images_are_bytes_on_the_cpu_in_batches_of_the_size_asked_for() -> None:
    sampling = replace(SAMPLINGS["ddim"], batch_size=4)
    batches = list(generate(SingleModel(one_level_unet()), tiny_adapter(), sampling, seed=1, indices=range(10)))
    assert [tuple(batch.shape) for batch in batches] == [(4, *SHAPE), (4, *SHAPE), (2, *SHAPE)]
    assert {batch.dtype for batch in batches} == {torch.uint8}
    assert not any(batch.is_inference() and batch.requires_grad for batch in batches)


def test_no_indices_make_no_images() -> None:
    assert list(generate(SingleModel(one_level_unet()), tiny_adapter(), Sampling(), seed=1, indices=[])) == []


def test_an_ensemble_of_copies_of_one_model_equals_that_model() -> None:
    model, sampling = one_level_unet(), Sampling(num_inference_steps=8)
    ensemble = Ensemble(equal_segments(4, 1000), [model] * 4)
    assert images(ensemble, sampling).equal(images(model, sampling))


def test_the_expert_of_each_segment_denoises_in_it() -> None:
    segments, experts = equal_segments(3, 1000), [one_level_unet(seed) for seed in range(3)]
    ensemble = Ensemble(segments, experts)
    for segment, expert in zip(segments, experts, strict=True):
        for timestep in (segment.low, segment.low + 100, segment.high - 1):
            assert ensemble.model_at(timestep) is expert


def test_only_the_experts_of_the_timesteps_sampled_matter() -> None:
    experts = [one_level_unet(seed) for seed in range(2)]
    segments = equal_segments(2, 1000)
    first = images(Ensemble(segments, experts), Sampling(num_inference_steps=4))
    swapped = images(Ensemble(segments, experts[::-1]), Sampling(num_inference_steps=4))
    assert not first.equal(swapped)


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_of_no_segment_is_an_error(timestep: int) -> None:
    ensemble = Ensemble(equal_segments(2, 1000), [one_level_unet()] * 2)
    with pytest.raises(ValueError, match=rf"timestep {timestep} is in none of the segments .*\[500, 1000\)"):
        ensemble.model_at(timestep)


def test_initial_noise_depends_on_seed_and_index_alone() -> None:
    noise, generators = initial_noise(3, [4, 9, 0], (2, 4, 4))
    assert noise.shape == (3, 2, 4, 4)
    assert initial_noise(3, [9], (2, 4, 4))[0][0].equal(noise[1])
    assert not initial_noise(4, [9], (2, 4, 4))[0][0].equal(noise[1])
    later = [torch.randn(5, generator=g) for g in generators]
    assert torch.randn(5, generator=initial_noise(3, [9], (2, 4, 4))[1][0]).equal(later[1])


def test_initial_noise_is_standard_normal() -> None:
    noise = initial_noise(0, range(200), (1, 16, 16))[0]
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)


def test_images_outside_the_range_are_clipped() -> None:
    values = torch.tensor([-7.0, -1.0, -1 / 255, 0.0, 1 / 255 + 1e-4, 1.0, 9.0])
    assert quantize(values).tolist() == [0, 0, 127, 128, 128, 255, 255]


@pytest.mark.parametrize(("size", "expected"), [(8, (3, 8, 8)), ([4, 6], (3, 4, 6))])
def test_the_shape_of_an_image_follows_from_the_config(size: int | list[int], expected: tuple[int, int, int]) -> None:
    adapter = Unconditional(denoiser_config={"sample_size": size, "in_channels": 3}, scheduler_config={})
    assert adapter.latent_shape == adapter.image_shape == expected


def adapter_of(**scheduler_config: Any) -> Adapter:
    config = {"sample_size": 8, "in_channels": 1, "_class_name": "UNet2DModel"}
    return Unconditional(denoiser_config=config, scheduler_config={"clip_sample": False, **scheduler_config})


@pytest.mark.parametrize("num_steps", [4, 10, 20, 50, 100, 500, 1000])
@pytest.mark.parametrize("of_model", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("spacing", [None, "leading", "trailing"])
def test_ddim_lands_on_the_noise_of_the_timestep_it_stops_at(
    num_steps: int, of_model: str, spacing: str | None
) -> None:
    adapter = adapter_of(timestep_spacing=of_model, set_alpha_to_one=False)
    scheduler = Sampling("ddim", num_steps, timestep_spacing=spacing).build_scheduler(adapter)
    clean, noise = torch.full((1, 1, 1, 1), 0.25), torch.ones(1, 1, 1, 1)
    stops = torch.tensor([*scheduler.timesteps.tolist(), 0]).unsqueeze(1)
    for here, there in itertools.pairwise(stops):
        noisy = adapter.noise_process.add_noise(clean, noise, here)
        reached = scheduler.step(noise, int(here), noisy).prev_sample
        torch.testing.assert_close(reached, adapter.noise_process.add_noise(clean, noise, there), atol=1e-4, rtol=1e-4)


def test_ddim_takes_leading_steps_of_a_model_that_came_with_linspace_and_says_so() -> None:
    default = DPMSolverMultistepScheduler().config
    assert default.timestep_spacing == "linspace"
    adapters = [adapter_of(timestep_spacing="linspace"), adapter_of(**default)]
    assert {Sampling().build_scheduler(adapter).config.timestep_spacing for adapter in adapters} == {"leading"}
    assert Sampling("ddpm").build_scheduler(adapters[0]).config.timestep_spacing == "linspace"


@pytest.mark.parametrize(
    ("sampler", "num_steps", "spacing", "sentence"),
    [
        ("ddim", 20, "linspace", "20 linspace steps .* set evaluate.timestep_spacing to leading, or leave it out"),
        ("ddim", 30, "trailing", "30 trailing steps .* to 25 or 40, or evaluate.timestep_spacing to leading"),
        ("ddim", 600, "trailing", "600 trailing steps .* to 500 or 1000, or evaluate.timestep_spacing to leading"),
        ("ddim", 600, "leading", "begin at timestep 599, far from noise.* to 500 or 751"),
        ("ddpm", 600, None, "begin at timestep 599, far from noise.* to 500 or 751"),
        ("ddim", 350, None, "begin at timestep 698, far from noise.* to 333 or 376"),
        ("ddim", 2, None, "begin at timestep 500, far from noise.* to 4"),
        ("ddpm", 3, "leading", "begin at timestep 666, far from noise.* to 4"),
        ("ddpm", 1, "linspace", "begin at timestep 0, far from noise.* to 2"),
        (
            "ddpm",
            61,
            "trailing",
            "61 trailing steps .* end at timestep -1, .* by rounding.* to 60 or 62",
        ),
    ],
)
def test_steps_that_miss_the_noise_are_refused_with_some_that_do_not(
    sampler: Sampler, num_steps: int, spacing: str | None, sentence: str
) -> None:
    with pytest.raises(InputError, match=rf"{sentence}\.$"):
        Sampling(sampler, num_steps, timestep_spacing=spacing).build_scheduler(adapter_of())
    for able in map(int, re.findall(r"(?:to|or) (\d+)", sentence)):
        Sampling(sampler, able, timestep_spacing=spacing).build_scheduler(adapter_of())


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [30, 600])
def test_ddpm_takes_any_number_of_steps_that_end_at_noise(num_steps: int, spacing: str) -> None:
    scheduler = Sampling("ddpm", num_steps, timestep_spacing=spacing).build_scheduler(adapter_of())
    for here, there in itertools.pairwise(scheduler.timesteps):
        assert scheduler.previous_timestep(here) == there


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
def test_noise_that_ddpm_would_leave_on_images_of_a_perfect_denoiser_is_refused(
    spacing: str, variance_type: str
) -> None:
    adapter = adapter_of(variance_type=variance_type, clip_sample=True)
    signal = adapter.noise_process.scheduler.alphas_cumprod  # type: ignore[attr-defined]

    class Perfect(nn.Module):
        def forward(self, noisy: torch.Tensor, timestep: torch.Tensor) -> Any:
            kept = signal[timestep].view(-1, 1, 1, 1)
            return SimpleNamespace(sample=(noisy - kept.sqrt() * 0.3) / (1 - kept).sqrt())

    sampling = Sampling("ddpm", 20, timestep_spacing=spacing)
    made = generate(SingleModel(Perfect()), adapter, sampling, seed=0, indices=range(2))
    if variance_type == "fixed_large_log":
        with pytest.raises(InputError, match="makes no images with the sampler ddpm and variance_type fixed_large_log"):
            next(made)
    elif variance_type == "fixed_large" and spacing == "trailing":
        with pytest.raises(InputError, match="leaves noise on the images of trailing steps, which end at timestep 49"):
            next(made)
    else:
        assert torch.unique(next(made)).tolist() == [166]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_offset_past_the_last_timestep_is_refused(sampler: Sampler) -> None:
    family = FAMILIES["StableDiffusionPipeline"]  # Whose steps have an offset of 1.
    adapter = family(denoiser_config={}, scheduler_config={"_class_name": "PNDMScheduler", "steps_offset": 1})
    with pytest.raises(InputError, match=r"begin at timestep 1000, past the last; .* to 999\."):
        Sampling(sampler, 1000).build_scheduler(adapter)
    assert Sampling(sampler, 999).build_scheduler(adapter).timesteps[0] == 999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@every_sampling
def test_a_gpu_makes_the_images_of_the_cpu(sampling: Sampling) -> None:
    model = one_level_unet()
    expected = images(model, sampling)
    made = generate(
        SingleModel(model.to("cuda")),
        tiny_adapter(),
        sampling,
        seed=1,
        indices=range(7),
        device="cuda",
    )
    # Float32 sums in another order, no TF32: single grey levels.
    assert int((torch.cat(list(made)).int() - expected.int()).abs().max()) <= 1


@every_sampling
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_of_a_model_that_diverged_are_no_images(sampling: Sampling, bad: float) -> None:
    model = one_level_unet()
    nn.init.constant_(model.conv_out.bias, bad)
    with pytest.raises(NonFiniteImagesError, match="7 of 7 images generated under seed 5 are NaN or infinite"):
        images(model, sampling, seed=5)
