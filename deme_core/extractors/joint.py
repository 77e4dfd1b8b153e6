"""Several extractors that see the same images."""

from collections.abc import Sequence

import numpy as np
import torch

from deme_core.digests import json_digest
from deme_core.extractors.base import FeatureArray, FeatureExtractor


def joint_digest(digests: Sequence[str]) -> str:
    """Returns the digest of extractors that see the same images, from theirs."""
    return json_digest(list(digests))


class JointExtractor:
    """The features of several extractors, one beside the other; `Reference.parts` takes them apart.

    Attributes:
        name: their names.
        digest: SHA-256 over their digests.
        num_features: length D of all feature vectors together.
        widths: length of each.
    """

    def __init__(self, extractors: Sequence[FeatureExtractor]) -> None:
        self._extractors = tuple(extractors)
        self.name = "+".join(each.name for each in extractors)
        self.digest = joint_digest([each.digest for each in extractors])
        self.widths = tuple(each.num_features for each in extractors)
        self.num_features = sum(self.widths)

    def __call__(self, images: torch.Tensor) -> FeatureArray:
        """Features (B, D) of uint8 images (B, C, H, W), C = 1 or 3."""
        return np.concatenate([extractor(images) for extractor in self._extractors], axis=1)
