"""Models whose configs mean what DeMe does not know: refused when they are opened, not trained as something else."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from deme_core.errors import InputError, ModelFolderError
from deme_core.families import FAMILIES, Unconditional
from deme_core.generate import SingleModel, generate
from deme_core.model_folder import open_model_folder
from deme_core.model_folder_writer import write_model_folder
from deme_core.sampling import Sampling
from deme_core.untrained_parts import untrained_scheduler, untrained_unet
from tests.tiny_models import SCHEDULER_CONFIG, one_level_unet, predict, tiny_adapter, tiny_images


@pytest.mark.parametrize(
    ("scheduler", "unet", "sentence"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {}, "has a FlowMatchEulerDiscreteScheduler, and not one"),
        ({"_class_name": "EDMEulerScheduler"}, {}, "has a EDMEulerScheduler, and not one of DDIM"),
        ({"_class_name": "ScoreSdeVeScheduler"}, {}, "has a ScoreSdeVeScheduler"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, {}, "has a CMStochasticIterativeScheduler"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, {}, "with use_flow_sigmas"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, {}, "with continuous timesteps"),
        ({"rescale_betas_zero_snr": True}, {}, "has rescale_betas_zero_snr, under which the last timestep"),
        ({"num_train_timesteps": None}, {}, "has num_train_timesteps None, which is no whole number from 1 to 100,000"),
        ({"num_train_timesteps": "abc"}, {}, "has num_train_timesteps 'abc'"),
        ({"num_train_timesteps": -5}, {}, "has num_train_timesteps -5"),
        ({"num_train_timesteps": 10**11}, {}, "has num_train_timesteps 100000000000"),
        ({}, {"num_class_embeds": 10}, "has num_class_embeds: it is told classes"),
        ({}, {"class_embed_type": "timestep"}, "has class_embed_type"),
        ({}, {"out_channels": 3}, "has 3 out_channels for 1 in_channels"),
    ],
)
def test_a_model_that_would_be_taken_for_another_is_refused(
    scheduler: dict[str, Any], unet: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    model = one_level_unet(**unet)
    write_model_folder(
        tmp_path,
        denoiser_config={"_class_name": "UNet2DModel", **model.config},
        scheduler_config=SCHEDULER_CONFIG | scheduler,
        tensors=model.state_dict(),
    )
    with pytest.raises(ModelFolderError, match=sentence):
        open_model_folder(tmp_path)


def test_zero_terminal_noise_ratio_is_fine_for_a_model_that_predicts_v() -> None:
    config = SCHEDULER_CONFIG | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert Unconditional.unsupported({}, config) is None


def test_a_consistency_model_is_no_stable_diffusion() -> None:
    problem = FAMILIES["StableDiffusionPipeline"].unsupported({"time_cond_proj_dim": 256}, SCHEDULER_CONFIG)
    assert problem is not None
    assert "told the guidance" in problem


def test_each_scheduler_that_is_known_has_betas_or_sigmas() -> None:
    for name in {name for family in FAMILIES.values() for name in family.schedulers}:
        settings = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert ("beta_start" in settings) != name.startswith("FlowMatch"), name


def test_the_variance_that_some_models_predict_is_left_out() -> None:
    model = one_level_unet(in_channels=3, out_channels=6)
    adapter = tiny_adapter(model, variance_type="learned_range")
    noisy, timesteps = tiny_images(2, channels=3), torch.tensor([3, 700])
    with torch.no_grad():
        assert adapter.predict(model, noisy, timesteps, {}).equal(predict(model)[:, :3])
    for sampler in adapter.noise_process.samplers:
        images = next(generate(SingleModel(model), adapter, Sampling(sampler, 4), seed=0, indices=[0]))
        assert images.shape == (1, 3, 8, 8)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(InputError, match="1001 sampling steps are more than the model's 1000 timesteps"):
        Sampling("ddim", 1001).build_scheduler(tiny_adapter())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dropuot": 0.3}, r"a UNet2DModel has no dropuot \(did you mean dropout\?\)"),
        ({"in_channels": 4}, r"pretrained\.unet\.in_channels follows from the data, which give 3"),
    ],
)
def test_a_setting_of_the_unet_that_would_be_ignored_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        untrained_unet("UNet2DModel", settings, {"in_channels": 3})
    made = untrained_unet("UNet2DModel", {"dropout": 0.3}, {"in_channels": 3})
    assert made == {"_class_name": "UNet2DModel", "dropout": 0.3, "in_channels": 3}


@pytest.mark.parametrize("settings", [{"beta_strat": 1}, {"beta_start": "much"}, {"rescale_betas_zero_snr": True}])
def test_a_noise_schedule_that_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"pretrained\.noise_scheduler (cannot be built|has rescale)"):
        untrained_scheduler(settings, Unconditional)
    assert untrained_scheduler({"beta_schedule": "squaredcos_cap_v2"}, Unconditional).config.num_train_timesteps == 1000
