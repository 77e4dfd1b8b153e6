from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from pydantic import BaseModel, ValidationError
from torch import nn

from deme_core.recipe import DistillSpec, EvaluateSpec, FinetuneSpec, Recipe, SearchSpec, SegmentsSpec, TrainingSpec
from deme_core.recipe_file import load_recipe
from tests.tiny_models import UNET_CONFIG, UNET_VARIANTS, tiny_conditional_unet

MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "pretrained": {"source": "google/ddpm-cifar10-32"},
    "dataset": {"source": "digits"},
    "segments": {"count": 2},
    "finetune": {"num_steps": 10},
    "merge": {"weights": [0.5, 0.5]},
    "evaluate": {"num_images": 100},
}


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({**MINIMAL, **changes})


def test_the_defaults_are_the_reference_settings_of_the_paper() -> None:
    # METHOD section 1, "Reference settings for LSUN-Church".
    finetune = recipe().finetune
    assert (finetune.learning_rate, finetune.lr_scheduler, finetune.adam_betas) == (5e-5, "constant", (0.95, 0.999))
    assert (finetune.weight_decay, finetune.max_grad_norm, finetune.batch_size) == (1e-6, 1.0, 16)
    assert (finetune.ema_decay, finetune.ema_inv_gamma, finetune.ema_power) == (0.9999, 1.0, 0.75)
    assert (finetune.global_sampling_probability, finetune.consistency_weight) == (0.3, 1.0)
    assert finetune.channel_projection


def specs(value: BaseModel) -> list[BaseModel]:
    children = [getattr(value, name) for name in type(value).model_fields]
    return [value, *(spec for child in children if isinstance(child, BaseModel) for spec in specs(child))]


def test_no_part_of_a_recipe_can_be_changed() -> None:
    parts = specs(recipe(merge={"search": {}}))
    assert len(parts) == 10
    for part in parts:
        for name in type(part).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(part, name, getattr(part, name))


@pytest.mark.parametrize("part", ["pretrained", "dataset", "segments", "finetune", "merge", "evaluate", "execution"])
def test_no_part_takes_an_unknown_key(part: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        recipe(**{part: {**MINIMAL.get(part, {}), "nonsense": 1}})


def test_segments_are_counted_from_count_or_edges() -> None:
    assert SegmentsSpec(count=3).num_segments == 3
    assert SegmentsSpec(edges=(0, 10, 1000)).num_segments == 2


@pytest.mark.parametrize("count", [1, 2, 4])
def test_merge_weights_are_one_per_segment(count: int) -> None:
    assert recipe(segments={"count": count}, merge={"weights": [0.1] * count})
    for wrong in (count - 1, count + 1):
        with pytest.raises(ValidationError, match=f"merge.weights has {wrong} values for {count} segments"):
            recipe(segments={"count": count}, merge={"weights": [0.1] * wrong})


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(value: str) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        recipe(merge={"weights": [0.5, float(value)]})
    for key in ("learning_rate", "consistency_weight", "max_grad_norm", "weight_decay"):
        with pytest.raises(ValidationError, match="finite number"):
            FinetuneSpec.model_validate({"num_steps": 1, key: float(value)})


@pytest.mark.parametrize("name", ["cosin", "piecewise_constant", ""])
def test_a_learning_rate_schedule_that_cannot_be_built_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="Input should be 'constant', "):
        TrainingSpec.model_validate({"num_steps": 1, "lr_scheduler": name})


def test_a_warm_up_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(ValidationError, match="'constant' ignores lr_warmup_steps; use constant_with_warmup"):
        TrainingSpec(num_steps=10, lr_warmup_steps=5)
    assert TrainingSpec(num_steps=10, lr_warmup_steps=5, lr_scheduler="constant_with_warmup")


def test_noise_of_ddim_is_refused_where_another_sampler_ignores_it() -> None:
    assert EvaluateSpec(num_images=10, eta=0.5)
    with pytest.raises(ValidationError, match="eta is the noise of ddim, and ddpm ignores it"):
        EvaluateSpec(num_images=10, eta=0.5, sampler="ddpm")


def test_betas_of_one_and_more_are_refused() -> None:
    with pytest.raises(ValidationError, match="must be at least 0 and below 1"):
        TrainingSpec(num_steps=1, adam_betas=(0.9, 1.0))


@pytest.mark.parametrize("seeds", [(1, 1, 2), (1, 2)])
def test_a_report_needs_three_different_sampling_seeds(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match=r"at least 3 items|seeds must differ"):
        EvaluateSpec(num_images=10, seeds=seeds)


def test_a_search_must_not_see_a_seed_of_the_report() -> None:
    assert recipe(merge={"search": {"seeds": [4]}}, evaluate={"num_images": 9, "seeds": [1, 2, 3]})
    with pytest.raises(ValidationError, match=r"share \[2, 3\]: a search must not see the report"):
        recipe(merge={"search": {"seeds": [2, 3, 4]}}, evaluate={"num_images": 9, "seeds": [1, 2, 3]})


def test_the_default_seeds_do_not_overlap() -> None:
    assert recipe(merge={"search": {}})


@pytest.mark.parametrize(("batch_size", "num_steps"), [(16, 40), (32, 60), (24, 50), (25, 52)])
def test_the_control_sees_as_many_images_as_copies_and_distillation_together(batch_size: int, num_steps: int) -> None:
    recipe = load_recipe("digits", ["finetune.num_steps=10", "finetune.batch_size=16", "segments.count=2"])
    assert recipe.num_control_steps(2) == 20
    distill = DistillSpec(num_steps=20, batch_size=batch_size)
    assert recipe.model_copy(update={"distill": distill}).num_control_steps(2) == num_steps


@pytest.mark.parametrize("weights", [{}, {"weights": [0.5, 0.5], "search": {}}])
def test_merge_weights_are_given_or_searched(weights: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="give either weights or search"):
        recipe(merge=weights)


def test_pretraining_needs_its_settings_and_only_pretraining_takes_them() -> None:
    with pytest.raises(ValidationError, match=r"source 'pretrain' needs pretrained\.training"):
        recipe(pretrained={"source": "pretrain"})
    for extra in ({"training": {"num_steps": 1}}, {"unet": {"act_fn": "silu"}}, {"noise_scheduler": {"beta_end": 0.1}}):
        assert recipe(pretrained={"source": "pretrain", "training": {"num_steps": 1}, **extra})
        with pytest.raises(ValidationError, match="apply to source 'pretrain' only"):
            recipe(pretrained={"source": "./model", **extra})


@pytest.mark.parametrize("source", ["imagefolder", "hub"])
def test_a_data_set_needs_path_and_resolution(source: str) -> None:
    with pytest.raises(ValidationError, match=f"source '{source}' needs a path"):
        recipe(dataset={"source": source, "resolution": 32})
    with pytest.raises(ValidationError, match=f"source '{source}' needs a resolution"):
        recipe(dataset={"source": source, "path": "images"})
    assert recipe(dataset={"source": source, "path": "images", "resolution": 32})


@pytest.mark.parametrize("change", [{"metrics": ["fid", "fid"]}, {"extractor_resolution": 64}])
def test_an_evaluation_is_of_something_that_is_defined(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"metrics must differ|inception is defined at 299 pixels only"):
        recipe(evaluate={"num_images": 10, **change})
    assert recipe(evaluate={"num_images": 10, "extractor": "efficientnet_lite0", "extractor_resolution": 64})


@pytest.mark.parametrize(("extractor", "side"), [("dinov2_vitl14", 224), ("clip_vit_b_32", 224), ("pixels_4x4", None)])
def test_an_extractor_takes_no_resolution_but_its_own(extractor: str, side: int | None) -> None:
    with pytest.raises(ValidationError, match=rf"extractor_resolution: {extractor} .*; leave it null"):
        recipe(evaluate={"num_images": 10, "extractor": extractor, "extractor_resolution": 64})
    assert recipe(evaluate={"num_images": 10, "extractor": extractor, "extractor_resolution": side})


@pytest.mark.parametrize("metrics", [["clip_score"], ["fid", "clip_score"]])
def test_a_metric_that_needs_prompts_is_refused_without(metrics: list[str]) -> None:
    with pytest.raises(ValidationError, match=r"clip_score needs prompts; set evaluate\.prompts to"):
        recipe(evaluate={"num_images": 10, "metrics": metrics})
    assert recipe(evaluate={"num_images": 10, "metrics": metrics, "prompts": "prompts.txt"})


@pytest.mark.parametrize("metric", ["precision", "recall"])
def test_what_cannot_decide_comes_not_first(metric: str) -> None:
    with pytest.raises(ValidationError, match=f"begin with one of fid, kid, clip_score: {metric} alone"):
        recipe(evaluate={"num_images": 10, "metrics": [metric, "fid"]})
    assert recipe(evaluate={"num_images": 10, "metrics": ["kid", metric]})


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x", "a/b", "é", "a\n", "٣"])
def test_a_name_is_plain(name: str) -> None:
    with pytest.raises(ValidationError, match=r"must be of letters .* and begin with a letter or digit"):
        recipe(name=name)
    assert recipe(name="8-Bit_a.b").name == "8-Bit_a.b"


TEXT_UNET = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["SimpleCrossAttnDownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}


def pretrained_of(side: int, unet: dict[str, Any], **more: Any) -> Recipe:
    pretrained = {"source": "pretrain", "unet": unet, "training": {"num_steps": 1}, **more}
    return recipe(pretrained=pretrained, dataset={"source": "digits", "resolution": side})


def keeps_side(model: nn.Module, side: int, **text: torch.Tensor) -> bool:
    """Whether a UNet gives back images of the side that it was given."""
    images = torch.zeros(1, model.config.in_channels, side, side)
    try:
        with torch.no_grad():
            return bool(model(images, 1, **text).sample.shape[-1] == side)
    except RuntimeError:
        return False


@pytest.mark.parametrize("kind", UNET_VARIANTS)
@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_a_resolution_that_the_unet_cannot_halve_is_refused_and_no_other(kind: str, num_levels: int) -> None:
    variant = UNET_CONFIG | UNET_VARIANTS[kind]
    lists = {name: value for name, value in variant.items() if isinstance(value, list)}
    unet = {name: [*value, *value][:num_levels] for name, value in lists.items()}
    model = UNet2DModel.from_config(variant | unet).eval()
    assert keeps_side(model, 16)
    for side in (16, 17, 18, 20):
        if keeps_side(model, side):
            assert pretrained_of(side, unet)
            continue
        multiple = 2 ** (num_levels - 1)
        with pytest.raises(
            ValidationError, match=rf"dataset\.resolution {side} must be a multiple of {multiple}, since"
        ):
            pretrained_of(side, unet)


@pytest.mark.parametrize(
    "up_block_types",
    [
        ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        ["UpBlock2D", "SimpleCrossAttnUpBlock2D", "UpBlock2D"],
        ["SimpleCrossAttnUpBlock2D"] * 3,
    ],
)
def test_a_resolution_of_a_model_that_takes_text_is_refused_only_where_its_unet_cannot_enlarge_to_it(
    up_block_types: list[str],
) -> None:
    unet = TEXT_UNET | {"up_block_types": up_block_types}
    model = tiny_conditional_unet(**unet)
    assert keeps_side(model, 8, encoder_hidden_states=torch.zeros(1, 2, 12))
    for side in (8, 9, 10):
        if keeps_side(model, side, encoder_hidden_states=torch.zeros(1, 2, 12)):
            assert pretrained_of(side, unet, text_encoder={})
            continue
        with pytest.raises(ValidationError, match=rf"dataset\.resolution {side} must be a multiple of"):
            pretrained_of(side, unet, text_encoder={})


def test_a_resolution_is_not_judged_by_a_unet_that_cannot_be_built_or_comes_from_elsewhere() -> None:
    assert pretrained_of(8, {})
    with pytest.raises(ValidationError, match=r"dataset\.resolution 12 must be a multiple of 8"):
        pretrained_of(12, {})  # Four levels by default.
    for unet in ({"block_out_channels": [8, 16]}, {"block_out_channels": 3}, {"up_block_types": []}):
        assert pretrained_of(15, unet)
    assert pretrained_of(15, {}, text_encoder={})
    assert recipe(dataset={"source": "digits", "resolution": 15})


@pytest.mark.parametrize("strategy", ["coordinate", "quadratic", "tpe", "cma_es", "gp"])
def test_a_search_can_try_every_weight(strategy: str) -> None:
    search = {"strategy": strategy, "max_candidates": 4}
    with pytest.raises(ValidationError, match=r"max_candidates 4 is too small for 4 weights: .* take 5"):
        recipe(segments={"count": 4}, merge={"search": search})
    assert recipe(segments={"count": 3}, merge={"search": search})
    assert recipe(segments={"count": 4}, merge={"search": search | {"strategy": "grid"}})


def test_a_search_of_block_weights_must_know_every_block_before_anything_is_trained() -> None:
    unet = {"block_out_channels": [8, 16], "norm_num_groups": 4}
    pretrained = {"source": "pretrain", "unet": unet, "training": {"num_steps": 1}}
    merge = {"method": "block_weights", "search": {"strategy": "coordinate", "max_candidates": 8}}
    with pytest.raises(ValidationError, match="max_candidates 8 is too small for 8 weights"):
        recipe(pretrained=pretrained, segments={"count": 2}, merge=merge)
    smaller = pretrained | {"unet": unet | {"mid_block_type": None}}
    assert recipe(pretrained=smaller, segments={"count": 2}, merge=merge).pretrained.num_blocks == 3
    assert recipe(pretrained={"source": "a/model"}, segments={"count": 2}, merge=merge)


def test_a_search_that_cannot_end_or_see_is_refused() -> None:
    grid = {"strategy": "grid", "values": [0.0, 0.25, 0.5, 0.75, 1.0]}
    assert recipe(segments={"count": 6}, merge={"search": grid})
    with pytest.raises(ValidationError, match="5 values has 78,125 combinations of 7 weights"):
        recipe(segments={"count": 7}, merge={"search": grid})
    with pytest.raises(ValidationError, match="a grid of the value 0 alone has theta_0 and no merge"):
        recipe(merge={"search": grid | {"values": [0.0, 0.0]}})
    with pytest.raises(ValidationError, match="same images twice"):
        recipe(merge={"search": {"seeds": [1001, 1001]}})
    evaluate = {"num_images": 10, "num_inference_steps": 20}
    with pytest.raises(ValidationError, match=r"few_steps 20 are no fewer than evaluate\.num_inference_steps 20"):
        recipe(merge={"search": {"few_steps": 20}}, evaluate=evaluate)
    assert recipe(merge={"search": {"few_steps": 19}}, evaluate=evaluate)


KNOWN = {"strategy": "cma_es", "known_weights": [[0.3, 1.2]], "known_scales": [0.5]}


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"search": KNOWN | {"known_scales": []}}, "give known_weights and known_scales, or neither"),
        ({"search": KNOWN | {"known_weights": []}}, "give known_weights and known_scales, or neither"),
        ({"search": KNOWN | {"strategy": "grid"}}, "strategy 'grid' takes no known_weights"),
        ({"search": KNOWN | {"strategy": "quadratic"}}, "strategy 'quadratic' takes no known_weights"),
        ({"search": KNOWN | {"known_weights": [[0.3]]}}, r"has 1 values in \[0.3\], for 2 segments"),
        ({"search": KNOWN | {"known_weights": [[0.3, 2.5]]}}, r"\[0.3, 2.5\] are not all in \[0, 2\]"),
        ({"search": KNOWN | {"known_scales": [-0.1]}}, r"\[-0.1\] are not all in \[0, 2\]"),
        ({"search": KNOWN | {"max_candidates": 2}}, r"max_candidates 2 is too small: .* take 3"),
        ({"search": KNOWN, "method": "block_weights"}, "which block_weights does not take"),
    ],
)
def test_what_is_known_of_weights_suits_the_search_and_gives_no_row_a_start_before_the_other(
    merge: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(segments={"count": 2}, merge=merge)


def test_known_weights_may_lie_where_the_search_looks_and_spare_it_candidates() -> None:
    below = KNOWN | {"known_weights": [[-0.3, 1.2]]}
    for search in (KNOWN | {"max_candidates": 3}, below | {"min_weight": -0.5}, below | {"strategy": "coordinate"}):
        assert recipe(segments={"count": 2}, merge={"search": search})
    dumped = recipe(segments={"count": 2}, merge={"search": {}}).merge.model_dump()["search"]
    assert not {"known_weights", "known_scales"} & set(dumped), "digests of searches without them stay"


def test_a_guard_is_a_score_that_is_computed_and_does_not_decide() -> None:
    evaluate = {"num_images": 10, "metrics": ["fid", "kid"], "more_extractors": ["pixels_4x4"]}
    assert recipe(merge={"search": {"guards": ["fd_pixels_4x4", "kid"]}}, evaluate=evaluate)
    for guard in ("fid", "recall", "fd_efficientnet_lite0"):
        with pytest.raises(ValidationError, match=rf"names {guard}; .*decides: kid, fd_pixels_4x4, kd_pixels_4x4"):
            recipe(merge={"search": {"guards": [guard]}}, evaluate=evaluate)
    with pytest.raises(ValidationError, match=r"kd_pixels_4x4, which is about 0.*; name fd_pixels_4x4"):
        recipe(merge={"search": {"guards": ["kd_pixels_4x4"]}}, evaluate=evaluate)


def test_a_search_has_only_the_metrics_that_decide_or_guard() -> None:
    evaluate = {"num_images": 10, "metrics": ["fid", "kid", "recall"], "kid_subset_size": 50}
    for guards, metrics, subset_size in [
        ([], ("fid",), 1000),
        (["fd_pixels_4x4"], ("fid",), 1000),
        (["recall_pixels_4x4"], ("fid", "recall"), 1000),
        (["kid"], ("fid", "kid"), 50),
    ]:
        made = recipe(merge={"search": {"guards": guards}}, evaluate=evaluate | {"more_extractors": ["pixels_4x4"]})
        searched = made.evaluate_for("search")
        assert (searched.metrics, searched.kid_subset_size) == (metrics, subset_size)


def test_a_search_has_only_the_extractors_of_its_guards() -> None:
    evaluate = {"num_images": 10, "more_extractors": ["pixels_4x4", "dinov2_vitl14"]}
    for guards, extractors in [([], ()), (["kid"], ()), (["kd_dinov2_vitl14"], ("dinov2_vitl14",))]:
        made = recipe(merge={"search": {"guards": guards}}, evaluate=evaluate)
        assert made.evaluate_for("search").more_extractors == extractors
        assert made.evaluate_for("report") == made.evaluate


@pytest.mark.parametrize("more", [["inception"], ["pixels_4x4", "pixels_4x4"], ["pixels_8x8"]])
def test_more_extractors_are_others(more: list[str]) -> None:
    with pytest.raises(ValidationError, match="more_extractors"):
        recipe(evaluate={"num_images": 10, "more_extractors": more})


def test_pixels_have_no_weights() -> None:
    with pytest.raises(ValidationError, match="extractor_weights: pixels_4x4 has none"):
        recipe(evaluate={"num_images": 10, "extractor": "pixels_4x4", "extractor_weights": "weights.pth"})


def test_a_recipe_of_one_extractor_has_the_digest_it_had() -> None:
    assert "more_extractors" not in EvaluateSpec(num_images=2).model_dump(mode="json")
    assert "guards" not in SearchSpec().model_dump(mode="json")


def test_real_images_are_those_of_the_training_unless_others_are_named() -> None:
    assert recipe().reference_dataset == recipe().dataset
    assert "reference_dataset" not in recipe().model_dump(mode="json")["evaluate"]
    others = {"source": "imagefolder", "path": "val", "resolution": 8}
    named = recipe(evaluate={"num_images": 100, "reference_dataset": others})
    assert (named.reference_dataset.path, named.dataset.source) == ("val", "digits")
    assert Recipe.model_validate(named.model_dump(mode="json")) == named


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"copies": ["a"]}, "copies has 1 models for 2 segments"),
        (
            {"copies": ["a", "b"], "pretrained": {"source": "pretrain", "training": {"num_steps": 1}}},
            "name it as pretrained",
        ),
        (
            {"copies": ["a", "b"], "finetune": {"num_steps": 1, "lora": {}}},
            "finetune.lora makes the control an adapter",
        ),
    ],
)
def test_copies_from_elsewhere_are_of_a_model_from_elsewhere(settings: dict[str, Any], sentence: str) -> None:
    assert recipe(copies=["a", "b"]).copies == ("a", "b")
    with pytest.raises(ValidationError, match=sentence):
        recipe(**settings)


def test_a_refusal_repeats_no_password() -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingSpec.model_validate({"num_steps": "s3://key:hush@bucket"})
    assert "num_steps" in str(caught.value) and "hush" not in str(caught.value)
