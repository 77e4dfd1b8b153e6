import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deme_core.binned_losses import (
    bin_edges,
    bin_shares,
    ensemble_losses,
    load_losses,
    mean_loss,
    own_change,
    relative_losses,
    save_losses,
)
from deme_core.errors import DatasetError
from deme_core.heldout_loss import heldout_losses
from deme_core.images import ImageDataset, load_images, split_heldout
from deme_core.recipe import DatasetSpec
from deme_core.segments import TimestepSegment
from tests.tiny_models import randomize, tiny_adapter, tiny_unet


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return load_images(DatasetSpec(source="digits", num_images=40), cache=tmp_path_factory.mktemp("cache"))


class Constant(torch.nn.Module):
    """Predicts one value everywhere, and remembers the timesteps it saw."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.seen: list[torch.Tensor] = []

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor) -> Any:
        self.seen.append(timestep)
        return type("Output", (), {"sample": torch.full_like(noisy, self.value)})


@pytest.mark.parametrize("segment_edges", [(0, 1000), (0, 500, 1000), (0, 333, 1000), (0, 10, 1000)])
def test_no_bin_spans_two_segments_and_there_are_at_least_twenty(segment_edges: tuple[int, ...]) -> None:
    edges = bin_edges(1000, segment_edges)
    assert (edges[0], edges[-1]) == (0, 1000)
    assert set(segment_edges) <= set(edges)
    assert len(edges) >= 21
    assert sum(bin_shares(edges)) == pytest.approx(1.0)


def test_the_loss_of_a_model_that_predicts_zero_is_that_of_the_noise(digits: ImageDataset) -> None:
    adapter = tiny_adapter()
    losses = heldout_losses(Constant(0.0), adapter, digits, edges=bin_edges(1000))
    assert losses.shape == (40, 20)
    assert losses.mean() == pytest.approx(1.0, abs=0.02)  # 40 x 20 x 64 squared standard normals.


def test_timesteps_are_stratified_within_each_bin(digits: ImageDataset) -> None:
    adapter, edges = tiny_adapter(), (0, 400, 1000)
    model = Constant(0.0)
    heldout_losses(model, adapter, digits, edges=edges)
    for timesteps, (low, high) in zip(model.seen, itertools.pairwise(edges), strict=True):
        step = (high - low) / len(digits)
        expected = [(low + index * step, low + (index + 1) * step) for index in range(len(digits))]
        assert all(a - 1 <= t <= b for t, (a, b) in zip(timesteps.tolist(), expected, strict=True))


def test_the_batch_size_changes_nothing(digits: ImageDataset) -> None:
    model, adapter = randomize(tiny_unet(), seed=1).eval(), tiny_adapter()
    small, large = (heldout_losses(model, adapter, digits, edges=(0, 500, 1000), batch_size=size) for size in (7, 64))
    np.testing.assert_allclose(small, large, rtol=1e-4)


def test_tf32_is_off_while_losses_are_measured(digits: ImageDataset) -> None:
    model, seen = tiny_unet().eval(), set()
    model.conv_in.register_forward_hook(lambda *_: seen.add(torch.backends.cudnn.allow_tf32))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        heldout_losses(model, tiny_adapter(), digits, edges=(0, 1000))
        assert torch.backends.cudnn.allow_tf32, "what is trained has its own setting"
    assert seen == {False}


def test_models_see_the_same_noise_and_another_seed_other_noise(digits: ImageDataset) -> None:
    adapter = tiny_adapter()
    first, second = (heldout_losses(Constant(value), adapter, digits, edges=(0, 1000)) for value in (0.0, 1e-9))
    np.testing.assert_allclose(first, second, rtol=1e-6)
    other = heldout_losses(Constant(0.0), adapter, digits, edges=(0, 1000), seed=1)
    assert not np.allclose(first, other)


def test_the_ensemble_takes_each_bin_from_its_expert() -> None:
    edges = (0, 250, 500, 750, 1000)
    experts = [np.full((3, 4), value, dtype=np.float32) for value in (1.0, 2.0)]
    found = ensemble_losses(experts, edges, [TimestepSegment(0, 500), TimestepSegment(500, 1000)])
    assert found.tolist() == [[1, 1, 2, 2]] * 3
    assert mean_loss(found, edges) == 1.5


def test_a_change_is_paired_and_counts_the_own_segment_alone() -> None:
    rng = np.random.default_rng(0)
    pretrained = rng.uniform(1, 3, (50, 4)).astype(np.float32)
    expert = pretrained * np.array([0.9, 0.9, 2.0, 2.0], dtype=np.float32)
    change = own_change(expert, pretrained, (0, 250, 500, 750, 1000), TimestepSegment(0, 500))
    assert change.mean == pytest.approx(-0.1, abs=1e-3)
    assert change.low < change.mean < change.high < 0
    worse = own_change(expert, pretrained, (0, 250, 500, 750, 1000), TimestepSegment(500, 1000))
    assert worse.mean == pytest.approx(1.0, abs=1e-3)


def test_wide_bins_weigh_more() -> None:
    edges, pretrained = (0, 100, 500, 1000), np.ones((3, 3), np.float32)
    change = own_change(pretrained * np.array([2, 1, 9], np.float32), pretrained, edges, TimestepSegment(0, 500))
    assert change.mean == pytest.approx(0.2)
    assert mean_loss(pretrained * np.array([1, 0, 0], np.float32), edges) == pytest.approx(0.1)


def test_relative_losses_have_an_interval_per_bin() -> None:
    pretrained = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    found = relative_losses(pretrained * np.float32(1.5), pretrained, (0, 10, 20))
    assert [change.mean for change in found.changes] == pytest.approx([0.5, 0.5])


def test_losses_come_back(tmp_path: Path) -> None:
    losses = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_losses(tmp_path, losses)
    np.testing.assert_array_equal(load_losses(tmp_path), losses)


@pytest.mark.parametrize(("num_heldout", "expected"), [(None, 4), (2, 2), (39, 39)])
def test_heldout_images_are_in_no_training_set(digits: ImageDataset, num_heldout: int | None, expected: int) -> None:
    training, heldout = split_heldout(digits, num_heldout)
    assert (len(training), len(heldout)) == (40 - expected, expected)
    every = sorted(digits.image(index).flatten().tolist() for index in range(40))
    both = sorted(part.image(i).flatten().tolist() for part in (training, heldout) for i in range(len(part)))
    assert both == every
    assert len({training.fingerprint, heldout.fingerprint, digits.fingerprint}) == 3


def test_something_is_left_for_training(digits: ImageDataset) -> None:
    with pytest.raises(DatasetError, match="leaves none of the 40 images"):
        split_heldout(digits, 40)
