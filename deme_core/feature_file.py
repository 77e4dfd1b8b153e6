"""Features of a slice of an image set, and its CLIP scores, as a file that can be read piece by piece."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_FILE = "features.safetensors"
_ROWS = 1024


def save_features(
    folder: Path, features: npt.NDArray[np.float32], clip_scores: npt.NDArray[np.float32] | None = None
) -> None:
    """Writes features (n, D), and CLIP scores (n,) where there are any, into a folder."""
    from safetensors.numpy import save_file

    scores = {} if clip_scores is None else {"clip_scores": clip_scores}
    save_file({"features": features, **scores}, folder / _FILE)


def read_features(folders: Sequence[Path]) -> Iterator[npt.NDArray[np.float32]]:
    """Yields the features of slices one after the other, (at most 1024, D) at a time."""
    from safetensors import safe_open

    for folder in folders:
        with safe_open(folder / _FILE, framework="numpy") as file:
            rows = file.get_slice("features")
            num_images = rows.get_shape()[0]
            for start in range(0, num_images, _ROWS):
                yield rows[start : min(start + _ROWS, num_images)]


def read_clip_scores(folders: Sequence[Path]) -> npt.NDArray[np.float32]:
    """Returns the CLIP scores of slices one after the other, (n,); all of them must hold some."""
    from safetensors import safe_open

    scores = []
    for folder in folders:
        with safe_open(folder / _FILE, framework="numpy") as file:
            scores.append(file.get_tensor("clip_scores"))
    return np.concatenate(scores)
