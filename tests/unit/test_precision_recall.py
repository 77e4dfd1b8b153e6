from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from deme_core.metrics.precision_recall import precision, recall

Array = npt.NDArray[np.float32]


def precision_recall(generated: Array, real: Array, **settings: int) -> tuple[float, float]:
    return precision(generated, real, **settings), recall(generated, real, **settings)


def draw(num_images: int, *, seed: int, centre: float = 0.0, width: int = 16) -> Array:
    rows = np.random.default_rng(seed).normal(centre, 1.0, size=(num_images, width))
    return rows.astype(np.float32)


def naive_share(points: Array, others: Array, num_neighbours: int) -> float:
    """The paper's definition, one pair at a time."""

    def distance(x: Array, y: Array) -> float:
        return float(np.sqrt(((x.astype(np.float64) - y.astype(np.float64)) ** 2).sum()))

    def radius(index: int) -> float:
        rest = sorted(distance(others[index], y) for position, y in enumerate(others) if position != index)
        return rest[num_neighbours - 1]

    radii = [radius(index) for index in range(len(others))]
    inside = [any(distance(x, y) <= radii[index] for index, y in enumerate(others)) for x in points]
    return sum(inside) / len(inside)


@pytest.mark.parametrize("centre", [0.0, 1000.0])
def test_a_set_is_wholly_among_itself(centre: float) -> None:
    features = draw(50, seed=0, centre=centre)
    assert precision_recall(features, features) == (1.0, 1.0)
    assert precision_recall(np.flip(features, axis=0), features, block_size=7) == (1.0, 1.0)


def test_far_clusters_share_nothing() -> None:
    assert precision_recall(draw(40, seed=0), draw(30, seed=1, centre=100.0)) == (0.0, 0.0)


def test_dropping_a_mode_lowers_recall_and_not_precision() -> None:
    real = np.concatenate([draw(60, seed=0, width=2), draw(60, seed=1, centre=50.0, width=2)])
    both = np.concatenate([draw(60, seed=2, width=2), draw(60, seed=3, centre=50.0, width=2)])
    whole_precision, whole_recall = precision_recall(both, real)
    dropped_precision, dropped_recall = precision_recall(both[:60], real)
    assert whole_precision > 0.9
    assert whole_recall > 0.9
    assert dropped_precision > 0.9
    assert dropped_recall <= 0.5
    # And the two are not swapped: what the model invents costs precision alone.
    invented = np.concatenate([both, draw(120, seed=4, centre=-50.0, width=2)])
    assert precision_recall(invented, real) == (whole_precision / 2, whole_recall)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_neighbours", [1, 3])
def test_it_agrees_with_the_definition_spelled_out(seed: int, num_neighbours: int) -> None:
    generated, real = draw(25, seed=seed, width=3), draw(33, seed=100 + seed, centre=0.5, width=3)
    expected = (naive_share(generated, real, num_neighbours), naive_share(real, generated, num_neighbours))
    assert precision_recall(generated, real, num_neighbours=num_neighbours) == expected


def test_a_point_on_the_surface_of_a_ball_is_inside() -> None:
    # Generated images that are real ones lie exactly at the radius of those whose k-th neighbour they are.
    real = draw(40, seed=0, centre=30.0, width=2048)
    for num_neighbours in (1, 3):
        generated = real[::2]
        expected = (naive_share(generated, real, num_neighbours), naive_share(real, generated, num_neighbours))
        assert precision_recall(generated, real, num_neighbours=num_neighbours) == expected
    copies = np.repeat(draw(3, seed=1, centre=30.0, width=2048), 4, axis=0)  # every radius is zero
    assert precision_recall(copies, copies) == (1.0, 1.0)
    assert precision_recall(copies + np.float32(0.01), copies) == (0.0, 0.0)


@pytest.mark.parametrize("block_size", [1, 7, 50, 1000])
def test_the_block_size_changes_nothing(block_size: int) -> None:
    generated, real = draw(50, seed=0, width=3), draw(41, seed=1, centre=1.0, width=3)
    shares = precision_recall(generated, real)
    assert min(shares) > 0
    assert max(shares) < 1
    assert precision_recall(generated, real, block_size=block_size) == shares


@pytest.mark.parametrize("sizes", [(3, 10), (10, 3), (0, 10)])
def test_fewer_images_than_neighbours_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"images have no 3 neighbours each; give more images\."):
        precision_recall(draw(sizes[0], seed=0), draw(sizes[1], seed=1))
    precision_recall(draw(4, seed=0), draw(4, seed=1))


@pytest.mark.parametrize(
    ("generated", "settings", "message"),
    [
        (draw(10, seed=0, width=3), {}, "cannot be compared"),
        (np.full((10, 16), np.nan, dtype=np.float32), {}, "NaN"),
        (draw(10, seed=0), {"num_neighbours": 0}, "at least 1"),
        (draw(10, seed=0), {"block_size": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(generated: Array, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        precision_recall(generated, draw(10, seed=1), **settings)
