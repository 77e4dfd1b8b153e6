import pytest

from deme_core.slices import slices


@pytest.mark.parametrize(
    ("num_images", "batch_size", "images_per_task", "expected"),
    [
        (10, 4, 100, [(0, 10)]),
        (10, 4, 4, [(0, 4), (4, 8), (8, 10)]),
        (10, 4, 7, [(0, 4), (4, 8), (8, 10)]),
        (10, 4, 1, [(0, 4), (4, 8), (8, 10)]),
        (16, 4, 9, [(0, 8), (8, 16)]),
    ],
)
def test_slices_hold_whole_batches(
    num_images: int, batch_size: int, images_per_task: int, expected: list[tuple[int, int]]
) -> None:
    assert slices(num_images, batch_size=batch_size, images_per_task=images_per_task) == expected
