from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from deme_core.errors import DemeError, NonFiniteImagesError
from deme_core.evaluation import FeatureSource, score_conditions, score_images, split_reference
from deme_core.extractors.clip import ClipScore
from deme_core.generate import SingleModel
from deme_core.manifest import ArtifactRef
from deme_core.metrics import Comparison, score
from deme_core.prompts import Prompts
from deme_core.recipe import EvaluateSpec
from deme_core.reference import Reference
from deme_core.sampling import Sampling
from deme_core.slices import slices
from tasks.jobs import JobResult
from tasks.row_scores import fingerprint, shared_conditions
from tests.tiny_models import one_level_unet, tiny_adapter


@dataclass(frozen=True)
class QuarterMeans:
    """A feature extractor in one line: the mean of each quarter of an image."""

    name: str = "efficientnet_lite0"
    digest: str = "quarters"
    num_features: int = 4

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1).numpy()


FEATURES = np.random.default_rng(0).random((30, 4)).astype(np.float32)
SOURCE = FeatureSource(
    adapter=tiny_adapter(),
    sampling=Sampling(num_inference_steps=5, batch_size=4),
    extractor=QuarterMeans(),
    device="cpu",
)
SCORING: dict[str, Any] = {
    "num_images": 11,
    "reference": Reference(FEATURES, "efficientnet_lite0", "quarters", "real"),
    "metrics": ("fid", "kid"),
    "kid_subset_size": 5,
}


def scores_of(source: FeatureSource, seed: int = 1) -> dict[str, float]:
    return score_images(source, SingleModel(one_level_unet()), seed, **SCORING)


def conditions_of(source: FeatureSource = SOURCE, **changes: Any) -> dict[str, Any]:
    """All that scores must share to be compared, as a job that evaluates puts it together."""
    return source.source_conditions() | score_conditions(**SCORING | changes)


def test_scores_are_those_of_the_images_of_the_seed() -> None:
    model = SingleModel(one_level_unet())
    images = torch.cat([batch.images for batch in SOURCE.batches(model, 1, range(11))])
    comparison = Comparison(features=QuarterMeans()(images), reference=SCORING["reference"], kid_subset_size=5)
    expected = score(comparison, ("fid", "kid"))
    scores = scores_of(SOURCE)
    assert images.shape == (11, 1, 8, 8)
    assert list(scores) == list(expected)
    assert scores == pytest.approx(expected)


def with_sampling(**changes: Any) -> FeatureSource:
    return replace(SOURCE, sampling=replace(SOURCE.sampling, **changes))


def test_the_precision_of_sampling_is_a_condition_of_the_score() -> None:
    assert conditions_of()["dtype"] == "float32"
    assert conditions_of(with_sampling(precision="bf16")) == conditions_of() | {"dtype": "bfloat16"}
    assert "mixed_precision" not in EvaluateSpec(num_images=4).model_dump()


def test_a_recipe_says_how_images_are_sampled() -> None:
    settings = {"sampler": "ddim", "num_inference_steps": 7, "eta": 0.5, "timestep_spacing": "trailing"}
    settings |= {"guidance_scale": 2.0, "batch_size": 3}
    evaluate = EvaluateSpec.model_validate(settings | {"num_images": 4, "mixed_precision": "bf16"})
    assert vars(Sampling.of(evaluate)) == settings | {"precision": "bf16"}
    assert Sampling.of(EvaluateSpec(num_images=4, sampler="ddpm")).sampler == "ddpm"


@pytest.mark.parametrize("batch_size", [1, 5, 11, 64])
def test_scores_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    # Single pixels may differ by one grey level, see test_generate.
    found = scores_of(with_sampling(batch_size=batch_size))
    assert found == pytest.approx(scores_of(SOURCE), rel=1e-2, abs=1e-4)


def test_seeds_differ() -> None:
    assert scores_of(SOURCE, seed=1) != scores_of(SOURCE, seed=2)


def fingerprint_of(conditions: dict[str, Any], seeds: tuple[int, ...] = (1, 2, 3)) -> str:
    """The fingerprint of a report whose rows were all evaluated so."""
    row = [JobResult(ArtifactRef("file:///store/a", "a"), {"conditions": conditions}, False, 0.0, 0.0)]
    return fingerprint(shared_conditions({"pretrained": row, "merged": row}, seeds))


PROMPTS = Prompts(("a", "b"), {}, "two prompts")
CLIP = ClipScore("tiny", embed_images=QuarterMeans(), embed_prompts=lambda texts: np.ones((len(texts), 4), np.float32))


@pytest.mark.parametrize(
    "other",
    [
        conditions_of(with_sampling(sampler="ddpm")),
        conditions_of(with_sampling(num_inference_steps=4)),
        conditions_of(with_sampling(eta=1.0)),
        conditions_of(with_sampling(timestep_spacing="trailing")),
        conditions_of(replace(SOURCE, adapter=tiny_adapter(clip_sample=False))),
        conditions_of(replace(SOURCE, adapter=tiny_adapter(beta_end=0.03))),
        conditions_of(replace(SOURCE, adapter=tiny_adapter(one_level_unet(in_channels=3)))),
        conditions_of(num_images=12),
        conditions_of(replace(SOURCE, extractor=QuarterMeans(digest="others"))),
        conditions_of(reference=Reference(FEATURES, "efficientnet_lite0", "quarters", "others")),
        conditions_of(reference=Reference(FEATURES[:-1], "efficientnet_lite0", "quarters", "real")),
        conditions_of(metrics=("kid",)),
        conditions_of(kid_subset_size=6),
        conditions_of(replace(SOURCE, prompts=PROMPTS)),
        conditions_of(replace(SOURCE, prompts=replace(PROMPTS, digest="others"))),
        conditions_of(replace(SOURCE, prompts=PROMPTS, clip=CLIP)),
        conditions_of(replace(SOURCE, prompts=PROMPTS, clip=replace(CLIP, digest="others"))),
    ],
    ids=range(17),
)
def test_every_condition_of_a_score_changes_the_fingerprint(other: dict[str, Any]) -> None:
    assert fingerprint_of(other) != fingerprint_of(conditions_of())
    assert set(other) >= set(conditions_of())


def test_prompts_and_clip_change_the_fingerprint_each_by_itself() -> None:
    both = replace(SOURCE, prompts=PROMPTS, clip=CLIP)
    other_prompts = replace(both, prompts=replace(PROMPTS, digest="others"))
    other_clip = replace(both, clip=replace(CLIP, digest="others"))
    sources = (both, other_prompts, other_clip, replace(both, clip=None))
    assert len({fingerprint_of(conditions_of(source)) for source in sources}) == 4


@pytest.mark.parametrize("seeds", [(1, 2, 4), (1, 2), (1, 2, 3, 4)])
def test_the_seeds_change_the_fingerprint(seeds: tuple[int, ...]) -> None:
    assert fingerprint_of(conditions_of(), seeds) != fingerprint_of(conditions_of())


def test_the_conditions_hold_every_single_field() -> None:
    conditions = conditions_of()
    assert {"sampler", "num_inference_steps", "eta", "scheduler", "dtype", "num_images"} < set(conditions)
    assert {"extractor", "reference", "shape", "deciding_metric", "kid_subset_size"} < set(conditions)
    assert {"timestep_spacing", "clip_sample", "prediction_type"} < set(conditions["scheduler"])


def test_rows_of_other_conditions_get_no_common_table() -> None:
    rows = {
        name: [JobResult(ArtifactRef("file:///store/a", "a"), {"conditions": conditions_of(each)}, False, 0.0, 0.0)]
        for name, each in {"pretrained": SOURCE, "merged": with_sampling(eta=1.0)}.items()
    }
    with pytest.raises(DemeError, match="they differ in eta"):
        shared_conditions(rows, (1, 2, 3))


def test_each_image_is_scored_with_its_own_prompt_whatever_the_slice() -> None:
    def embed(texts: Any) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[["abc".index(text) for text in texts]]

    # As many prompts as no batch is a multiple of: each one begins with another.
    prompts = Prompts(("a", "b", "c"), {}, "three prompts")
    source = replace(SOURCE, prompts=prompts, clip=replace(CLIP, embed_prompts=embed))
    model = SingleModel(one_level_unet())
    whole = np.concatenate([batch.clip_scores for batch in source.batches(model, 1, range(11))])
    features = np.concatenate([batch.features for batch in source.batches(model, 1, range(11))])
    expected = 100 * features[np.arange(11), np.arange(11) % 3] / np.linalg.norm(features, axis=1)
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    part = np.concatenate([batch.clip_scores for batch in source.batches(model, 1, range(5, 11))])
    np.testing.assert_allclose(part, whole[5:], rtol=1e-2)


@pytest.mark.parametrize("broken", ["features", "CLIP scores"])
def test_what_is_not_finite_gets_no_score(broken: str) -> None:
    class Broken(QuarterMeans):
        def __call__(self, images: torch.Tensor) -> np.ndarray:
            return np.full((len(images), 4), np.nan, np.float32)

    if broken == "features":
        source = replace(SOURCE, extractor=Broken())
    else:
        source = replace(SOURCE, prompts=PROMPTS, clip=replace(CLIP, embed_images=Broken()))
    with pytest.raises(NonFiniteImagesError, match=f"{broken} .*NaN or infinite"):
        scores_of(source)


@pytest.mark.parametrize(
    "other",
    [
        with_sampling(batch_size=9),
        with_sampling(timestep_spacing="leading"),  # What the scheduler config means by saying nothing.
        replace(SOURCE, device="cuda"),
        replace(SOURCE, adapter=tiny_adapter(_diffusers_version="0.1.0")),
    ],
    ids=["batch size", "default spelled out", "device", "diffusers version of the file"],
)
def test_what_changes_no_image_is_no_condition(other: FeatureSource) -> None:
    assert conditions_of(other) == conditions_of()


@pytest.mark.parametrize(("num_images", "num_for_search"), [(10, 0), (10, 4), (1797, 898), (10, 10)])
def test_search_and_report_divide_the_real_images(num_images: int, num_for_search: int) -> None:
    search, report = split_reference(num_images, num_for_search)
    assert len(search) == num_for_search
    assert sorted(search + report) == list(range(num_images))
    assert (search, report) == (sorted(search), sorted(report))
    assert split_reference(num_images, num_for_search) == (search, report)


def test_the_images_for_search_and_report_are_spread_over_the_data_set() -> None:
    for part in split_reference(10_000, 1000, 1000):
        assert len(part) == 1000
        assert sum(part) / len(part) == pytest.approx(5000, abs=300)


@pytest.mark.parametrize("images_per_task", [1, 4, 8])
def test_slices_made_by_tasks_of_their_own_are_bit_for_bit_the_image_set(images_per_task: int) -> None:
    model = SingleModel(one_level_unet())
    whole = [batch.images for batch in SOURCE.batches(model, 1, range(11))]
    ranges = slices(11, batch_size=4, images_per_task=images_per_task)
    sliced = [b.images for low, high in reversed(ranges) for b in SOURCE.batches(model, 1, range(low, high))]
    assert {tuple(image.flatten().tolist()) for batch in sliced for image in batch} == {
        tuple(image.flatten().tolist()) for batch in whole for image in batch
    }
    low, high = ranges[-1]
    last = torch.cat([batch.images for batch in SOURCE.batches(model, 1, range(low, high))])
    assert last.equal(torch.cat(whole)[low:high])
