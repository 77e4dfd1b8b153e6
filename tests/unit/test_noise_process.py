from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from deme_core.errors import ModelFolderError
from deme_core.generate import Ensemble
from deme_core.noise_process import Diffusion, FlowMatching, NoiseProcess
from deme_core.objectives import training_target
from deme_core.segments import equal_segments
from tests.tiny_models import SCHEDULER_CONFIG, one_level_unet, tiny_images, tiny_scheduler

FLOW = FlowMatching(1000)
CLEAN, NOISE = tiny_images(4, seed=1), torch.randn((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
TIMESTEPS = torch.tensor([0, 249, 250, 999])


def test_diffusion_is_that_of_the_scheduler() -> None:
    process, scheduler = Diffusion.from_config(SCHEDULER_CONFIG), tiny_scheduler()
    assert process.num_train_timesteps == 1000
    assert process.add_noise(CLEAN, NOISE, TIMESTEPS).equal(scheduler.add_noise(CLEAN, NOISE, TIMESTEPS))
    assert process.target(CLEAN, NOISE, TIMESTEPS).equal(training_target(scheduler, CLEAN, NOISE, TIMESTEPS))


@pytest.mark.parametrize("process", [FLOW, Diffusion.from_config(SCHEDULER_CONFIG)], ids=["flow", "diffusion"])
def test_what_the_denoiser_is_told_leads_back_to_what_was_drawn(process: NoiseProcess) -> None:
    everything = torch.arange(1000)
    assert [process.training_timestep(t) for t in process.model_timesteps(everything).tolist()] == everything.tolist()


def test_a_timestep_of_the_sampler_belongs_to_the_interval_that_ends_above_it() -> None:
    assert [FLOW.training_timestep(t) for t in (0.3, 500.0, 500.2, 500.9)] == [0, 499, 500, 500]
    assert FLOW.training_timestep(900.00006) == 899, "float32 makes that of 900"


def test_flow_matching_goes_straight_from_images_to_noise() -> None:
    sigmas = torch.tensor([0.001, 0.25, 0.251, 1.0]).view(-1, 1, 1, 1)
    noisy = FLOW.add_noise(CLEAN, NOISE, TIMESTEPS)
    torch.testing.assert_close(noisy, (1 - sigmas) * CLEAN + sigmas * NOISE)
    torch.testing.assert_close(noisy[3], NOISE[3])
    torch.testing.assert_close(noisy - sigmas * FLOW.target(CLEAN, NOISE, TIMESTEPS), CLEAN, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"num_train_timesteps": "abc"}, "describes no noise schedule"),
        ({"beta_start": "x"}, "describes no noise schedule"),
        ({"beta_schedule": "evil"}, "describes no noise schedule"),
        ({"trained_betas": ["a"]}, "describes no noise schedule"),
        ({"trained_betas": [0.1]}, "no beta between 0 and 1 for each of 1000 timesteps"),
        ({"beta_end": 1.5}, r"beta_end as 1\.5; a beta is at least 0 and less than 1"),
        ({"beta_end": 1}, "beta_end as 1;"),
        ({"beta_end": float("nan")}, "beta_end as nan;"),
        ({"beta_end": float("inf"), "beta_schedule": "sigmoid"}, "beta_end as inf;"),
        ({"beta_start": -1}, "beta_start as -1;"),
        ({"beta_start": -1, "beta_schedule": "scaled_linear"}, "beta_start as -1;"),
        ({"trained_betas": [0.1] * 999 + [1.5]}, r"trained_betas\[999\] as 1\.5;"),
        ({"trained_betas": [-0.1] + [0.1] * 999}, r"trained_betas\[0\] as -0\.1;"),
        ({"trained_betas": [0.1, float("nan")]}, r"trained_betas\[1\] as nan;"),
        ({"beta_end": 1 - 1e-12}, "no beta between 0 and 1 for each of 1000 timesteps"),
        ({"prediction_type": "zz"}, "prediction_type as 'zz', not as one of epsilon, sample, v_prediction"),
        ({"timestep_spacing": "zz"}, "timestep_spacing as 'zz', not as one of leading, trailing, linspace"),
        ({"clip_sample_range": "a"}, "clip_sample_range as 'a', not as a number"),
        ({"steps_offset": 10**6}, "steps_offset as 1000000, which is no timestep"),
        ({"steps_offset": -1}, "steps_offset as -1, which is no timestep"),
        (
            {"_class_name": "HeunDiscreteScheduler"},
            "gives no beta_start, and HeunDiscreteScheduler has its own, 0.00085",
        ),
    ],
    ids=str,
)
def test_a_config_that_describes_no_noise_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelFolderError, match=rf"scheduler_config\.json .*{sentence}"):
        Diffusion.from_config(SCHEDULER_CONFIG | config)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_start": 0, "beta_end": 0.9},
        {"beta_schedule": "squaredcos_cap_v2", "beta_end": 1.5},
        {"trained_betas": [0.01] * 1000, "beta_end": 1.5},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=str,
)
def test_betas_that_can_be_are_taken(config: dict[str, Any]) -> None:
    assert Diffusion.from_config(SCHEDULER_CONFIG | config).num_train_timesteps == 1000


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_sampler_follows_the_target_from_noise_to_the_images(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(7)
    sample = NOISE
    for timestep in scheduler.timesteps:
        sample = scheduler.step(FLOW.target(CLEAN, NOISE, TIMESTEPS), timestep, sample).prev_sample
    torch.testing.assert_close(sample, CLEAN, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_timestep_of_the_sampler_belongs_to_the_segment_that_holds_its_sigma(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(50)
    segments, experts = equal_segments(4, 1000), [one_level_unet(seed) for seed in range(4)]
    ensemble = Ensemble(segments, experts)
    for timestep, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False):
        expert = experts.index(ensemble.model_at(FLOW.training_timestep(timestep)))
        assert expert / 4 < sigma <= (expert + 1) / 4
