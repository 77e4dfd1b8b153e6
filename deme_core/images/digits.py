"""Scikit-learn's handwritten digits: a data set that needs no network."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deme_core.images.source import LABEL, Column


class DigitsSource:
    """1,797 grey images of 8x8 pixels, as lossless PGM files in memory."""

    description = "the digits"
    listing = None
    columns: Sequence[str] = (LABEL,)

    def __init__(self) -> None:
        table = _read_table()
        self._labels: list[int] = table[:, -1].astype(int).tolist()
        pixels = np.floor(table[:, :-1] * (255 / 16) + 0.5).astype(np.uint8)
        self._encoded = [b"P5 8 8 255\n" + image.tobytes() for image in pixels]

    def __len__(self) -> int:
        return len(self._encoded)

    def name(self, index: int) -> str:
        """Position among the digits."""
        return f"digit {index}"

    def read(self, index: int) -> bytes:
        """One PGM file."""
        return self._encoded[index]

    def column(self, name: str) -> Column | None:
        """Which digit each one is."""
        return Column(self._labels, [str(digit) for digit in range(10)]) if name == LABEL else None


def _read_table() -> np.ndarray:
    """Returns float64 (1797, 65): 64 levels from 0 to 16, by row, and the digit.

    From scikit-learn's own file: to import scikit-learn takes a core more than a second, and all of pandas.
    """
    found = importlib.util.find_spec("sklearn")
    for package in found.submodule_search_locations or () if found else ():
        file = Path(package, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # Where it keeps its files in another place.

    pixels, digits = load_digits(return_X_y=True)
    return np.column_stack([pixels, digits])
