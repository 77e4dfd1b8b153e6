"""The reference: what scores need to know of the real images."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from deme_core.errors import ArtifactNotFoundError
from deme_core.feature_statistics import (
    Features,
    FeatureStatistics,
    Float64Array,
    check_features,
    factor_of,
    mean_and_factor,
)

REFERENCE_FILE = "reference.safetensors"
_METADATA_KEY = "deme"  # one key only: safetensors does not keep the order of several, and so not the bytes
_NAMES = ("extractor_name", "extractor_digest", "images_digest")


@dataclass(frozen=True, eq=False)
class Reference:
    """The features of the real images, or their statistics, with what every comparison needs computed once.

    Attributes:
        features: (m, D), m >= 2; kept as float32, so that a saved reference scores as an unsaved one does. None where
            the Fréchet distance is all that is wanted, which needs no more than ``given_statistics``.
        extractor_name: the extractor that made them; names the metrics.
        extractor_digest: digest of that extractor's weights and preprocessing.
        images_digest: digest of the real images.
        given_statistics: mean and covariance; computed from the features where these are given.
    """

    features: Features | None
    extractor_name: str
    extractor_digest: str = ""
    images_digest: str = ""
    given_statistics: FeatureStatistics | None = None

    def __post_init__(self) -> None:
        assert (self.features is None) != (self.given_statistics is None), "features or statistics, not both"
        if self.features is None:
            return
        features = check_features(self.features).astype(np.float32)
        features.flags.writeable = False
        object.__setattr__(self, "features", features)

    @property
    def num_images(self) -> int:
        """Number m of real images."""
        return self.statistics.num_images if self.features is None else len(self.features)

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Mean and covariance of the features."""
        if self.given_statistics is not None:
            return self.given_statistics
        assert self.features is not None
        return FeatureStatistics.from_features(self.features)

    @cached_property
    def factor(self) -> Float64Array:
        """F (min(m, D), D) float64, or of fewer rows, with FᵀF the covariance."""
        if self.features is not None and self.num_images <= self.features.shape[1]:
            return mean_and_factor(self.features)[1]
        return factor_of(self.statistics.covariance)

    def save(self, folder: Path) -> Path:
        """Write ``reference.safetensors`` into a folder, which is created, and return its path."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        content = {name: getattr(self, name) for name in _NAMES}
        if self.features is not None:
            tensors = {"features": self.features}
        else:
            tensors = {"mean": self.statistics.mean, "covariance": self.statistics.covariance}
            content["num_images"] = self.num_images
        metadata = {_METADATA_KEY: json.dumps(content, sort_keys=True)}
        save_file(tensors, folder / REFERENCE_FILE, metadata=metadata)
        return folder / REFERENCE_FILE

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote; a folder without it is an ArtifactNotFoundError."""
        from safetensors import safe_open

        path = folder / REFERENCE_FILE
        if not path.is_file():
            raise ArtifactNotFoundError(f"{folder} holds no {REFERENCE_FILE}.")
        with safe_open(path, framework="numpy") as file:
            content = json.loads(file.metadata()[_METADATA_KEY])
            num_images = content.pop("num_images", None)
            if num_images is None:
                return cls(file.get_tensor("features"), **content)
            statistics = FeatureStatistics(file.get_tensor("mean"), file.get_tensor("covariance"), num_images)
            return cls(None, **content, given_statistics=statistics)
