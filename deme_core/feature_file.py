"""Features of a slice of an image set, as a file that can be read piece by piece."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_FILE = "features.safetensors"
_ROWS = 1024


def save_features(folder: Path, features: npt.NDArray[np.float32]) -> None:
    """Writes features (n, D) into a folder."""
    from safetensors.numpy import save_file

    save_file({"features": features}, folder / _FILE)


def read_features(folders: Sequence[Path]) -> Iterator[npt.NDArray[np.float32]]:
    """Yields the features of slices one after the other, (at most 1024, D) at a time."""
    from safetensors import safe_open

    for folder in folders:
        with safe_open(folder / _FILE, framework="numpy") as file:
            rows = file.get_slice("features")
            num_images = rows.get_shape()[0]
            for start in range(0, num_images, _ROWS):
                yield rows[start : min(start + _ROWS, num_images)]
