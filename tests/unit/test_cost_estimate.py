import dataclasses
from pathlib import Path
from typing import Any

import pytest

from deme_core.cost_estimate import NUM_CHECKPOINTS_STORED, estimate_cost
from deme_core.denoiser_size import DenoiserSize, measure_denoiser
from deme_core.errors import InputError
from deme_core.families import Unconditional
from deme_core.families.pixart import PixArt
from deme_core.families.stable_diffusion import StableDiffusion
from deme_core.model_folder import build_denoiser, open_model_folder
from deme_core.projection import attach_projections
from deme_core.recipe import DistillSpec, LoraSpec, Recipe
from deme_core.rows import NUM_ROWS
from tasks.work import training_run
from tests.tiny_pipelines import save_pipeline

SIZE = DenoiserSize(100, 1000, num_trained=110, trained_forward_flops=1100, latent_size=8, caption_size=20)
CONTENT: dict[str, Any] = {
    "name": "tiny",
    "pretrained": {"source": "folder"},
    "dataset": {"source": "imagefolder", "path": "images", "resolution": 8},
    "segments": {"count": 3},
    "finetune": {"num_steps": 10, "batch_size": 4, "gradient_accumulation_steps": 2},
    "merge": {"weights": [0.1, 0.1, 0.1]},
    "evaluate": {"num_images": 50, "num_inference_steps": 5},
}
UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4,
    "add_attention": False,
}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({key: value | sections.get(key, {}) if isinstance(value, dict) else value
                                  for key, value in CONTENT.items()})  # fmt: skip


def cost(**sections: Any) -> Any:
    return estimate_cost(recipe(**sections), SIZE, num_images=7, num_features=16, frozen_bytes=1000)


def test_a_distillation_costs_its_images_twice_and_a_row() -> None:
    plain, distilled = (
        cost(),
        estimate_cost(
            recipe().model_copy(update={"distill": DistillSpec(num_steps=5, batch_size=4)}),
            SIZE,
            num_images=7,
            num_features=16,
        ),
    )
    # 5 steps of 4 images, and 3 of 8 that the control takes more.
    assert distilled.training_flops - plain.training_flops == (5 * 4 + 3 * 8) * (3 * 1100 + 1000)
    assert distilled.evaluation_flops == plain.evaluation_flops * (NUM_ROWS + 1) / NUM_ROWS


def test_training_is_three_passes_and_a_frozen_one_of_all_copies_and_the_control() -> None:
    # 3 copies of 10 steps and a control of 30, 8 images a step.
    assert cost().training_flops == 60 * 8 * (3 * 1100 + 1000)
    assert cost(finetune={"consistency_weight": 0.0}).training_flops == 60 * 8 * 3 * 1100
    # Only copies have timesteps outside of their segment, for which the frozen model is asked.
    replay = cost(finetune={"consistency_weight": 0.0, "replay": "pretrained"})
    assert replay.training_flops == 30 * 8 * (2 * 3 * 1100 + 1000)
    assert cost(finetune={"gradient_checkpointing": True}).training_flops == 60 * 8 * (4 * 1100 + 1000)


def test_images_cost_a_pass_per_step_and_two_with_guidance() -> None:
    assert cost().evaluation_flops == 4 * 3 * 50 * 5 * 1000
    assert cost(evaluate={"guidance_scale": 2.0}).evaluation_flops == 2 * cost().evaluation_flops
    assert cost().search_flops == 0


@pytest.mark.parametrize(
    ("search", "passes"),
    [
        ({"max_candidates": 6}, 2 * 6 * 5),
        # The grid of the control reaches further: 0, 0.5, 1, 1.5.
        ({"strategy": "grid", "values": [0.0, 0.5]}, (2**3 + 4) * 5),
        # All of 6 in 2 steps, and in full the better half and theta_0.
        ({"max_candidates": 6, "few_steps": 2, "survivors": 0.5}, 2 * (6 * 2 + (3 + 1) * 5)),
    ],
)
def test_searches_cost_all_their_candidates(search: dict[str, Any], passes: int) -> None:
    settings = {"weights": None, "search": search | {"num_images": 20, "seeds": [7, 8]}}
    assert cost(merge=settings).search_flops == passes * 2 * 20 * 1000


def test_copies_from_elsewhere_cost_no_training() -> None:
    found = estimate_cost(
        recipe().model_copy(update={"copies": ("a", "b", "c")}), SIZE, num_images=7, num_features=16, frozen_bytes=1000
    )
    assert found.training_flops == 30 * 8 * (3 * 1100 + 1000)
    assert (found.num_trainings, found.model_bytes) == (1, cost().model_bytes)


def test_a_search_needs_theta_0_twice_and_all_copies_and_the_ensemble_the_copies() -> None:
    search: dict[str, Any] = {"merge": {"weights": None, "search": {}}}
    lora = {"finetune": {"lora": {"rank": 2}, "channel_projection": False}}
    assert cost().sampling_bytes == 4 * 3 * 110
    assert cost(**search).sampling_bytes == 4 * (2 * 100 + 3 * 110)
    small = dataclasses.replace(SIZE, num_trained=5)
    assert estimate_cost(recipe(**lora), small, num_images=7, num_features=16).sampling_bytes == 4 * (100 + 3 * 5)


def test_memory_is_weights_gradients_moments_average_and_the_frozen_model() -> None:
    assert cost().memory_bytes == 4 * (5 * 110 + 100)
    assert cost(finetune={"optimizer": "adamw_8bit"}).memory_bytes == 4 * (3 * 110 + 100) + 2 * 110
    assert cost(finetune={"consistency_weight": 0.0}).memory_bytes == 4 * 5 * 110


def test_storage_is_models_checkpoints_features_and_encodings() -> None:
    found = cost()
    assert found.model_bytes == 4 * 4 * 110 + 3 * (4 * 100 + 1000)
    assert found.feature_bytes == 4 * 3 * 50 * 16 * 4
    assert found.encoding_bytes == 7 * (8 + 20) * 4
    lasting = found.model_bytes + 9600 * 4 + 784
    assert found.storage_bytes == lasting + 3 * found.checkpoint_bytes
    assert found.local_bytes == lasting + 2 * found.checkpoint_bytes
    assert cost(dataset={"random_flip": True, "cache_precision": "bf16"}).encoding_bytes == 7 * (16 + 20) * 2
    assert cost(dataset={"crop": "random"}).encoding_bytes == 0


@pytest.mark.parametrize(("num_workers", "num_trainings"), [(1, 1), (3, 3), (8, 4), (None, 4)])
def test_every_training_that_runs_has_checkpoints(num_workers: int | None, num_trainings: int) -> None:
    # 3 copies and the control: weights, average and two moments of each.
    found = estimate_cost(recipe(), SIZE, num_images=7, num_features=16, num_workers=num_workers)
    assert found.num_trainings == num_trainings
    assert found.checkpoint_bytes == num_trainings * 4 * 4 * 110
    assert NUM_CHECKPOINTS_STORED == training_run._NUM_CHECKPOINTS_KEPT + 1


def test_time_is_operations_over_rates() -> None:
    seconds = cost().seconds(training_rate=1e6, image_rate=2e6)
    assert seconds == pytest.approx(60 * 8 * 4300 / 1e6 + 4 * 3 * 50 * 5 * 1000 / 2e6)


def test_a_unet_is_counted_layer_by_layer() -> None:
    size = measure_denoiser(Unconditional(denoiser_config=UNET, scheduler_config={}), channel_projection=True)
    model = build_denoiser(UNET)
    assert size.num_parameters == sum(p.numel() for p in model.parameters())
    # 8 x 8 pixels, 3 x 3 kernels, 8 channels but for the two ends, where they are 3, and the two blocks of the way up,
    # which take 16; 1 x 1 shortcuts of those; linear maps of the timestep to 32, 32, and 8 in each of the 5 blocks.
    pixels, blocks = 8 * 8, 1 + 2 + 2
    convolutions = 2 * 3 * 8 * 9 + (2 * blocks * 8 * 8 + 2 * 8 * 8) * 9 + 2 * 16 * 8
    linear = 8 * 32 + 32 * 32 + blocks * 32 * 8
    assert size.forward_flops == 2 * (pixels * convolutions + linear)
    attach_projections(model)
    assert size.num_trained == sum(p.numel() for p in model.parameters())
    assert size.num_trained == size.num_parameters + blocks * 8 * 8
    assert size.trained_forward_flops == size.forward_flops + 2 * pixels * blocks * 8 * 8
    assert (size.latent_size, size.caption_size) == (0, 0)


def test_stable_diffusion_is_counted_with_its_captions() -> None:
    config = {"_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "cross_attention_dim": 16}
    blocks = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 4, "layers_per_block": 1}
    kinds = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    adapter = StableDiffusion(denoiser_config=config | blocks | kinds, scheduler_config={})
    size = measure_denoiser(adapter, channel_projection=False)
    assert (size.num_trained, size.trained_forward_flops) == (size.num_parameters, size.forward_flops)
    assert (size.latent_size, size.caption_size) == (4 * 8 * 8, 77 * 16)


@pytest.mark.parametrize(
    "name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "IFPipeline", "DiTPipeline"]
)
def test_every_denoiser_is_counted_as_it_is_called(name: str, tmp_path: Path) -> None:
    adapter = open_model_folder(save_pipeline(name, tmp_path)).adapter()
    size = measure_denoiser(adapter, channel_projection=False, lora=LoraSpec(rank=2))
    model = build_denoiser(dict(adapter.denoiser_config))
    assert size.num_parameters == sum(p.numel() for p in model.parameters())
    assert 0 < size.num_trained < size.num_parameters
    assert size.trained_forward_flops > size.forward_flops > 0
    assert (size.caption_size > 0) == (name != "DiTPipeline")
    assert size.latent_size == (0 if name == "IFPipeline" else 4 * 8 * 8)


def test_another_family_is_said_to_be_unknown() -> None:
    adapter = PixArt(denoiser_config={"_class_name": "PixArtTransformer2DModel"}, scheduler_config={})
    with pytest.raises(InputError, match="cost of a PixArtAlphaPipeline is not estimated yet"):
        measure_denoiser(adapter, channel_projection=False)


def test_a_lora_trains_two_passes_on_one_model_whose_control_is_as_large_as_all() -> None:
    lora = {"lora": {"rank": 2}}
    size = DenoiserSize(100, 1000, num_trained=10, trained_forward_flops=1020, latent_size=8, caption_size=20)
    found = estimate_cost(recipe(finetune=lora), size, num_images=7, num_features=16, frozen_bytes=1000)
    assert found.training_flops == 60 * 8 * (2 * 1020 + 1000)
    assert found.memory_bytes == 4 * (100 + 3 * 10 * (3 + 2))
    # The control's, and three of a third of its size.
    assert found.checkpoint_bytes == 4 * (3 * 10 + 3 * 10) * (2 + 2)
    assert found.model_bytes == 4 * (3 * 10 + 3 * 10) + 3 * (400 + 1000)


def test_an_adapter_is_counted_alone() -> None:
    attention = {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"], "attention_head_dim": 4}
    adapter = Unconditional(denoiser_config=UNET | attention, scheduler_config={})
    size = measure_denoiser(adapter, channel_projection=False, lora=LoraSpec(rank=2))
    layers = 4 * 3  # One attention in the down block, two in the up block, each of four layers of 8 x 8.
    assert size.num_trained == layers * 2 * (8 + 8)
    assert size.num_parameters == measure_denoiser(adapter, channel_projection=False).num_trained
    assert size.trained_forward_flops > size.forward_flops
