import numpy as np
import pytest
from pydantic import ValidationError

from deme_core.bootstrap import resample
from deme_core.feature_statistics import FeatureStatistics
from deme_core.metrics import Comparison, Counts, MetricName, Resamples, deciding_metric, frechet_resamples, kernel
from deme_core.metrics.frechet import frechet_distance_to
from deme_core.recipe import EvaluateSpec
from deme_core.reference import Reference
from deme_core.verdict import RowScores, Verdict, compare


def draw(num_images: int, num_features: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    scale = np.linspace(0.2, 1.5, num_features)
    return (generator.standard_normal((num_images, num_features)) * scale + shift).astype(np.float32)


def replicates(
    name: MetricName, features: np.ndarray, reference: Reference, counts: Counts, real: Counts | None = None
) -> np.ndarray:
    metric = deciding_metric(name)
    assert metric is not None
    comparison = Comparison(features=features, reference=reference, kid_subset_size=2)
    return metric.replicates(comparison, Resamples(counts, real))


def draws(num_images: int, *, num_replicates: int, seed: int) -> Counts:
    return resample(num_images, None, num_replicates=num_replicates, seed=seed).generated


def test_every_resample_holds_as_many_images_as_there_are() -> None:
    counts = draws(40, num_replicates=7, seed=1)
    assert counts.shape == (7, 40)
    assert (counts.sum(axis=1) == 40).all()
    assert (draws(40, num_replicates=7, seed=1) == counts).all()
    assert (draws(40, num_replicates=9, seed=1)[:7] == counts).all(), "more resamples go on where fewer end"
    assert (draws(40, num_replicates=7, seed=2) != counts).any()


def test_sets_of_generated_images_share_the_resamples_of_the_real_ones() -> None:
    one, other = (resample(40, 60, num_replicates=7, seed=seed) for seed in (1, 2))
    assert one.real is not None and other.real is not None
    assert (one.real == other.real).all()
    assert one.real.shape == (7, 60)
    assert (one.real.sum(axis=1) == 60).all()
    assert (one.generated == draws(40, num_replicates=7, seed=1)).all()


@pytest.mark.parametrize(("num_images", "num_real", "num_features"), [(30, 50, 8), (30, 20, 64), (12, 90, 64)])
def test_a_frechet_replicate_is_the_distance_of_the_repeated_images(
    num_images: int, num_real: int, num_features: int
) -> None:
    features, real = draw(num_images, num_features, seed=1, shift=0.3), draw(num_real, num_features, seed=2)
    reference = Reference(real, "inception")
    counts = draws(num_images, num_replicates=5, seed=3)
    found = replicates("fid", features, reference, counts)
    expected = [frechet_distance_to(reference, np.repeat(features, count, axis=0)) for count in counts]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("most_products", [10**8, 0])
@pytest.mark.parametrize(
    ("num_images", "num_real", "num_features"), [(30, 50, 8), (30, 20, 64), (12, 90, 64), (90, 12, 64), (300, 300, 8)]
)
def test_a_frechet_replicate_of_both_sets_is_the_distance_of_the_repeated_images(
    num_images: int, num_real: int, num_features: int, most_products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frechet_resamples, "_MOST_PRODUCTS", most_products)
    monkeypatch.setattr("deme_core.feature_statistics._ROWS", 37)
    features, real = draw(num_images, num_features, seed=1, shift=9.3), draw(num_real, num_features, seed=2, shift=9)
    resamples = resample(num_images, num_real, num_replicates=5, seed=3)
    assert resamples.real is not None
    found = replicates("fid", features, Reference(real, "inception"), resamples.generated, resamples.real)
    expected = [
        frechet_distance_to(Reference(np.repeat(real, theirs, axis=0), "inception"), np.repeat(features, ours, axis=0))
        for ours, theirs in zip(resamples.generated, resamples.real, strict=True)
    ]
    assert found == pytest.approx(expected, rel=1e-6)


def test_statistics_alone_give_the_same_frechet_replicates() -> None:
    features, real = draw(30, 8, seed=1), draw(50, 8, seed=2)
    counts = draws(30, num_replicates=4, seed=3)
    streamed = Reference(None, "inception", given_statistics=FeatureStatistics.from_batches([real[:7], real[7:]]))
    expected = replicates("fid", features, Reference(real, "inception"), counts)
    assert replicates("fid", features, streamed, counts) == pytest.approx(expected, rel=1e-9)


def test_a_kernel_replicate_pairs_no_image_with_itself() -> None:
    features, real = draw(12, 4, seed=1).astype(np.float64), draw(9, 4, seed=2).astype(np.float64)
    count = draws(12, num_replicates=1, seed=3)
    drawn = np.repeat(np.arange(12), count[0])

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 4 + 1) ** 3)

    within = np.mean([kernel(features[i], features[j]) for i in drawn for j in drawn if i != j])
    across = np.mean([kernel(features[i], y) for i in drawn for y in real])
    among = np.mean([kernel(real[i], real[j]) for i in range(9) for j in range(9) if i != j])
    found = replicates("kid", features, Reference(real, "inception"), count)
    assert found[0] == pytest.approx(within - 2 * across + among, rel=1e-5)
    real_count = draws(9, num_replicates=1, seed=4)
    theirs = np.repeat(np.arange(9), real_count[0])
    across = np.mean([kernel(features[i], real[j]) for i in drawn for j in theirs])
    among = np.mean([kernel(real[i], real[j]) for i in theirs for j in theirs if i != j])
    found = replicates("kid", features, Reference(real, "inception"), count, real_count)
    assert found[0] == pytest.approx(within - 2 * across + among, rel=1e-5)


def test_kernel_replicates_do_not_depend_on_how_many_rows_are_in_memory_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, reference = draw(12, 4, seed=1), Reference(draw(9, 4, seed=2), "inception")
    counts, real_counts = draws(12, num_replicates=4, seed=3), draws(9, num_replicates=4, seed=3)
    at_once = replicates("kid", features, reference, counts, real_counts)
    monkeypatch.setattr(kernel, "_ROWS", 5)
    assert replicates("kid", features, reference, counts, real_counts) == pytest.approx(at_once, rel=1e-9)


def test_a_kernel_replicate_of_one_image_is_that_of_a_model_that_makes_nothing_else() -> None:
    features, real = draw(2, 4, seed=1), draw(9, 4, seed=2)
    reference = Reference(real, "inception")
    found = replicates("kid", features, reference, np.array([[2, 0], [1, 1], [0, 2]]))
    # Two images that are alike have the same pairs, but are two.
    for alone, image in ((found[0], features[0]), (found[2], features[1])):
        twins = replicates("kid", np.stack([image, image]), reference, np.array([[1, 1]]))
        assert alone == pytest.approx(twins[0], rel=1e-6)
    for num_images in (2, 3, 4):
        counts = draws(num_images, num_replicates=100, seed=1)
        of_few = replicates("kid", draw(num_images, 4, seed=3), reference, counts)
        assert np.isfinite(of_few).all()
        assert of_few.std() > 0, "few images are no sure ones"


def test_one_resample_is_refused() -> None:
    assert [EvaluateSpec(num_images=2, num_bootstrap=number).num_bootstrap for number in (0, 2)] == [0, 2]
    with pytest.raises(ValidationError, match="num_bootstrap must be 0 or at least 2"):
        EvaluateSpec(num_images=2, num_bootstrap=1)


def test_the_spread_of_replicates_is_that_of_fresh_image_sets() -> None:
    """What the bootstrap is for: it tells from one image set how much the score varies between sets."""
    reference = Reference(draw(500, 4, seed=0), "inception")
    fresh = [frechet_distance_to(reference, draw(400, 4, seed=seed, shift=0.2)) for seed in range(1, 200)]
    counts = draws(400, num_replicates=200, seed=1)
    spreads = [replicates("fid", draw(400, 4, seed=s, shift=0.2), reference, counts).std() for s in range(300, 310)]
    assert np.mean(spreads) == pytest.approx(np.std(fresh), rel=0.2)


def test_of_fewer_images_than_features_the_bootstrap_is_too_wide_and_never_too_narrow() -> None:
    """Else a verdict would not be safe with the few images that a small machine can make."""
    reference = Reference(draw(500, 64, seed=0), "inception")

    def other_row(features: np.ndarray) -> np.ndarray:
        return (np.tanh(features) * 1.1 + 0.05).astype(np.float32)

    sets = [draw(40, 64, seed=seed, shift=0.2) for seed in range(1, 200)]
    fresh = np.array([[frechet_distance_to(reference, f) for f in (one, other_row(one))] for one in sets])
    spreads = []
    for seed in range(300, 310):
        features, counts = draw(40, 64, seed=seed, shift=0.2), draws(40, num_replicates=100, seed=seed)
        row, other = (replicates("fid", f, reference, counts) for f in (features, other_row(features)))
        spreads.append((row.std(), (row - other).std()))
    of_row, of_difference = np.min(spreads, axis=0)
    assert of_row > fresh[:, 0].std()
    assert of_difference > (fresh[:, 0] - fresh[:, 1]).std()


@pytest.mark.parametrize("metric", ["fid", "kid"])
def test_rows_as_far_from_all_real_images_are_not_told_apart_by_the_few_that_were_drawn(metric: MetricName) -> None:
    """Each row is off in a direction of its own; by which of them the reference is, too, is the luck of its draw."""
    judged = {real: [_judge(metric, trial, resamples_real=real) for trial in range(40)] for real in (True, False)}
    wrong = {real: sum(verdict != "too close to call" for verdict in found) for real, found in judged.items()}
    assert wrong[True] <= 3, "the bootstrap sees how far the score depends on the real images"
    assert wrong[False] > 2 * wrong[True] + 3, "which the generated ones alone do not tell"


def _judge(metric: MetricName, trial: int, *, resamples_real: bool) -> Verdict:
    generator = np.random.default_rng(trial)
    reference = Reference(generator.standard_normal((200, 8)).astype(np.float32), "inception")
    rows: dict[int, tuple[list[float], list[np.ndarray]]] = {0: ([], []), 1: ([], [])}
    for seed in range(5):
        noise = generator.standard_normal((200, 8))
        resamples = resample(200, 200 if resamples_real else None, num_replicates=50, seed=seed)
        for row, (scores, of_resamples) in rows.items():
            features = (noise + 0.5 * np.eye(8)[row]).astype(np.float32)
            comparison = Comparison(features=features, reference=reference, kid_subset_size=200)
            found = deciding_metric(metric)
            assert found is not None
            # Of the kernel distance not the mean over subsets, which takes long.
            scores.append(float(found.replicates(comparison, Resamples(np.ones((1, 200), int)))[0]))
            of_resamples.append(found.replicates(comparison, resamples))
    one, other = (RowScores(scores, [each.tolist() for each in found]) for scores, found in rows.values())
    return compare(one, other, higher_is_better=False)
