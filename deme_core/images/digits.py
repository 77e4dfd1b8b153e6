"""Scikit-learn's handwritten digits: a data set that needs no network."""

import numpy as np


class DigitsSource:
    """1,797 grey images of 8x8 pixels, as lossless PGM files in memory."""

    description = "the digits"
    listing = None

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        values = load_digits().images  # float64 (1797, 8, 8), 0..16
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
