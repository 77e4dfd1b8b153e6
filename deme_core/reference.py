"""The reference: what scores need to know of the real images."""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from deme_core.errors import ArtifactNotFoundError
from deme_core.feature_statistics import (
    Features,
    FeatureStatistics,
    Float64Array,
    check_features,
    factor_of,
    in_blocks,
    mean_and_factor,
)

REFERENCE_FILE = "reference.safetensors"
_METADATA_KEY = "deme"  # one key only: safetensors does not keep the order of several, and so not the bytes
_NAMES = ("extractor_name", "extractor_digest", "images_digest")


@dataclass(frozen=True, eq=False)
class Reference:
    """The features of the real images, or their statistics, with what every comparison needs computed once.

    Attributes:
        features: (m, D), m >= 2; kept as float32, so that a saved reference scores as an unsaved one does; of a loaded
            one memory-mapped. None where the Fréchet distance is all that is wanted, which needs no more than
            ``given_statistics``.
        extractor_name: the extractor that made them; names the metrics.
        extractor_digest: digest of that extractor's weights and preprocessing.
        images_digest: digest of the real images.
        given_statistics: mean and covariance; computed from the features where these are given.
        widths: features of each extractor, where several made them side by side; empty for one.
    """

    features: Features | None
    extractor_name: str
    extractor_digest: str = ""
    images_digest: str = ""
    given_statistics: FeatureStatistics | None = None
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert (self.features is None) != (self.given_statistics is None), "features or statistics, not both"
        if self.features is None:
            return
        features = check_features(self.features)
        features = features.astype(np.float32, copy=features.flags.writeable)
        features.flags.writeable = False
        object.__setattr__(self, "features", features)

    @property
    def num_images(self) -> int:
        """Number m of real images."""
        return self.statistics.num_images if self.features is None else len(self.features)

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Mean and covariance of the features, of which a block at a time is copied."""
        if self.given_statistics is not None:
            return self.given_statistics
        assert self.features is not None
        return FeatureStatistics.from_batches(in_blocks(self.features))

    @cached_property
    def factor(self) -> Float64Array:
        """F (min(m, D), D) float64, or of fewer rows, with FᵀF the covariance."""
        if self.features is not None and self.num_images <= self.features.shape[1]:
            return mean_and_factor(self.features)[1]
        return factor_of(self.statistics.covariance)

    @cached_property
    def parts(self) -> tuple["Reference", ...]:
        """The reference of each extractor; itself where there is but one."""
        if not self.widths:
            return (self,)
        names = self.extractor_name.split("+")
        return tuple(self._part(name, columns) for name, columns in zip(names, self.columns, strict=True))

    @property
    def columns(self) -> list[slice]:
        """Where in a feature vector those of each extractor are; empty for one."""
        ends = itertools.accumulate(self.widths, initial=0)
        return [slice(begin, end) for begin, end in itertools.pairwise(ends)]

    def _part(self, name: str, columns: slice) -> "Reference":
        if self.features is not None:
            return Reference(self.features[:, columns], name, images_digest=self.images_digest)
        both = self.statistics
        own = FeatureStatistics(both.mean[columns], both.covariance[columns, columns], both.num_images)
        return Reference(None, name, images_digest=self.images_digest, given_statistics=own)

    def save(self, folder: Path) -> Path:
        """Write ``reference.safetensors`` into a folder, which is created, and return its path."""
        from safetensors.numpy import save_file

        names = {name: getattr(self, name) for name in _NAMES}
        if self.features is not None:
            return save_reference(folder, [self.features], num_images=self.num_images, widths=self.widths, **names)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.statistics.mean, "covariance": self.statistics.covariance}
        save_file(
            tensors,
            folder / REFERENCE_FILE,
            metadata=_metadata(names | _named(self.widths) | {"num_images": self.num_images}),
        )
        return folder / REFERENCE_FILE

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, features memory-mapped; a folder without it is an ArtifactNotFoundError."""
        from safetensors import safe_open

        path = folder / REFERENCE_FILE
        if not path.is_file():
            raise ArtifactNotFoundError(f"{folder} holds no {REFERENCE_FILE}.")
        with safe_open(path, framework="numpy") as file:
            content = json.loads(file.metadata()[_METADATA_KEY])
            content["widths"] = tuple(content.get("widths", ()))
            num_images = content.pop("num_images", None)
            if num_images is None:
                return cls(_map_features(path, file.get_slice("features").get_shape()), **content)
            statistics = FeatureStatistics(file.get_tensor("mean"), file.get_tensor("covariance"), num_images)
            return cls(None, **content, given_statistics=statistics)


def save_reference(
    folder: Path,
    batches: Iterable[Features],
    *,
    num_images: int,
    extractor_name: str,
    extractor_digest: str = "",
    images_digest: str = "",
    widths: tuple[int, ...] = (),
) -> Path:
    """Write what `Reference.save` writes of features, of which one batch at a time is in memory; return its path.

    Args:
        folder: where to; it is created.
        batches: features (B, D), cast to float32; must be finite (else InputError).
        num_images: images in all of them.
        extractor_name: as of `Reference`.
        extractor_digest: as of `Reference`.
        images_digest: as of `Reference`.
        widths: as of `Reference`.
    """
    content = {
        "extractor_name": extractor_name,
        "extractor_digest": extractor_digest,
        "images_digest": images_digest,
        **_named(widths),
    }
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    with (folder / REFERENCE_FILE).open("wb") as file:
        for batch in batches:
            if done == 0:
                file.write(_header(content, (num_images, batch.shape[1])))
            file.write(np.ascontiguousarray(check_features(batch, at_least=1), np.float32).data)
            done += len(batch)
    assert done == num_images, (done, num_images)
    return folder / REFERENCE_FILE


def _named(widths: tuple[int, ...]) -> dict[str, Any]:
    """The entry of the metadata; none for one extractor, whose references stay what they were, byte for byte."""
    return {"widths": list(widths)} if widths else {}


def _metadata(content: dict[str, Any]) -> dict[str, str]:
    return {_METADATA_KEY: json.dumps(content, sort_keys=True)}


def _header(content: dict[str, Any], shape: tuple[int, int]) -> bytes:
    """The beginning of a safetensors file as that library writes it, which wants all features in memory at once."""
    features = {"dtype": "F32", "shape": shape, "data_offsets": (0, 4 * shape[0] * shape[1])}
    header = json.dumps({"__metadata__": _metadata(content), "features": features}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _map_features(path: Path, shape: Sequence[int]) -> Features:
    """Features (m, D), the last of a file, read-only."""
    offset = path.stat().st_size - 4 * shape[0] * shape[1]
    return np.asarray(np.memmap(path, np.float32, mode="r", offset=offset, shape=tuple(shape)))
