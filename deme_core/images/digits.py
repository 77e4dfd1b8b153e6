"""Scikit-learn's handwritten digits: a data set that needs no network."""

from collections.abc import Sequence

import numpy as np

from deme_core.images.source import LABEL, Column


class DigitsSource:
    """1,797 grey images of 8x8 pixels, as lossless PGM files in memory."""

    description = "the digits"
    listing = None
    columns: Sequence[str] = (LABEL,)

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        values = digits.images  # float64 (1797, 8, 8), 0..16
        self._labels: list[int] = digits.target.tolist()
        pixels = np.floor(values * (255 / 16) + 0.5).astype(np.uint8)
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
