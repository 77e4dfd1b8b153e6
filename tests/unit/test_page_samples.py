import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deme_core.figures import cut_tiles, save_image_grid
from deme_core.html_report.content import Picture
from deme_core.prompts import Prompts, load_prompts
from tasks.page_samples import image_prompts, page_samples

PROMPTS = Prompts(("a cat", "a ship"), {}, "digest")


def grid(path: Path, *, count: int, side: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), generator=rng, dtype=torch.uint8)
    save_image_grid(images, path)
    return images


@pytest.mark.parametrize(("count", "side", "factor"), [(5, 16, 2), (7, 40, 1), (1, 32, 1)])
def test_tiles_are_the_images_of_the_grid_in_order(tmp_path: Path, count: int, side: int, factor: int) -> None:
    images = grid(tmp_path / "g.png", count=count, side=side)
    tiles = cut_tiles(tmp_path / "g.png", side=side, count=count)
    assert len(tiles) == count
    for image, tile in zip(images, tiles, strict=True):
        pixels = np.asarray(tile)[::factor, ::factor]
        assert np.array_equal(pixels, image.permute(1, 2, 0).numpy())
    assert len(cut_tiles(tmp_path / "g.png", side=side, count=1)) == 1


def test_every_row_shows_the_same_prompts_under_its_own_images(tmp_path: Path) -> None:
    grids = {row: tmp_path / f"{row}.png" for row in ("pretrained", "merged")}
    for seed, path in enumerate(grids.values()):
        grid(path, count=12, side=16, seed=seed)
    samples = page_samples(grids, 1, {"num_images": 12, "shape": [3, 16, 16]}, PROMPTS)
    assert [[picture.caption for picture in row] for row in samples.rows.values()] == [["a cat", "a ship"]] * 2
    assert len({picture.uri for row in samples.rows.values() for picture in row}) == 4


def test_a_prompt_stands_under_its_own_images(tmp_path: Path) -> None:
    images = grid(tmp_path / "g.png", count=15, side=32)
    samples = page_samples({"merged": tmp_path / "g.png"}, 1, {"num_images": 15, "shape": [3, 32, 32]}, PROMPTS)
    cat, ship = (decoded(picture) for picture in samples.rows["merged"])
    assert cat.shape == ship.shape == (32, 6 * 34 - 2, 3)  # The first six of eight, and of seven.
    for index in range(6):
        assert np.array_equal(cat[:, 34 * index :][:, :32], images[2 * index].permute(1, 2, 0).numpy())
        assert np.array_equal(ship[:, 34 * index :][:, :32], images[2 * index + 1].permute(1, 2, 0).numpy())


def test_of_more_prompts_than_images_the_first_are_shown(tmp_path: Path) -> None:
    grid(tmp_path / "g.png", count=12, side=32)
    many = Prompts(tuple(f"prompt {index}" for index in range(40)), {}, "digest")
    row = page_samples({"merged": tmp_path / "g.png"}, 1, {"num_images": 12, "shape": [3, 32, 32]}, many).rows["merged"]
    assert [picture.caption for picture in row] == [f"prompt {index}" for index in range(10)]
    assert all(decoded(picture).shape == (32, 32, 3) for picture in row)


def test_of_a_grid_of_fewer_images_none_is_white(tmp_path: Path) -> None:
    """Of 100 images a slice of 50 has 7 lines of 8 tiles, the last six of them empty."""
    grid(tmp_path / "g.png", count=50, side=32)
    ten = Prompts(tuple(f"prompt {index}" for index in range(10)), {}, "digest")
    row = page_samples({"merged": tmp_path / "g.png"}, 1, {"num_images": 100, "shape": [3, 32, 32]}, ten).rows["merged"]
    assert [decoded(picture).shape for picture in row] == [(32, 5 * 34 - 2, 3)] * 10


def test_white_images_before_the_last_line_are_images(tmp_path: Path) -> None:
    save_image_grid(torch.full((50, 3, 32, 32), 255, dtype=torch.uint8), tmp_path / "g.png")
    ten = Prompts(tuple(f"prompt {index}" for index in range(10)), {}, "digest")
    row = page_samples({"merged": tmp_path / "g.png"}, 1, {"num_images": 100, "shape": [3, 32, 32]}, ten).rows["merged"]
    assert len(row) == 10


def test_prompts_that_changed_since_the_images_were_made_stand_above_none(tmp_path: Path) -> None:
    (file := tmp_path / "prompts.txt").write_text("a cat\na ship\n")
    recipe, settings = (
        SimpleNamespace(evaluate=SimpleNamespace(prompts=str(file))),
        SimpleNamespace(cache_folder=tmp_path),
    )
    runtime: Any = SimpleNamespace(recipe=recipe, settings=settings)
    prompts = load_prompts(str(file), tmp_path)
    assert image_prompts(runtime, {"prompts": prompts.digest}) == prompts
    assert image_prompts(runtime, {"prompts": "digest of others"}) is None


def decoded(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))))


def test_without_prompts_a_row_is_one_grid(tmp_path: Path) -> None:
    grid(tmp_path / "g.png", count=4, side=16)
    samples = page_samples({"merged": tmp_path / "g.png"}, 1, {"num_images": 4, "shape": [3, 16, 16]}, None)
    (picture,) = samples.rows["merged"]
    assert picture.caption is None
