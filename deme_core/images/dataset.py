"""Image data sets: square uint8 images under a fingerprint."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from deme_core.digests import json_digest
from deme_core.errors import DatasetError
from deme_core.images.conditioning import Conditioning, read_conditioning
from deme_core.images.inspection import Inspection, inspect
from deme_core.images.opening import open_source
from deme_core.images.pixels import PIXELS_VERSION, BrokenImageError, center_corner, crop, decode, resize
from deme_core.images.source import ImageSource
from deme_core.images.stream import Stream, StreamedTars
from deme_core.recipe import DatasetSpec
from deme_core.store import ObjectStore


@dataclass(frozen=True, eq=False)
class ResizedImage:
    """One image before it is cropped.

    Attributes:
        pixels: uint8 (C, H, W), 0..255, the shorter side the resolution of the data set.
        original_size: height and width of the image as it is stored, upright.
    """

    pixels: torch.Tensor
    original_size: tuple[int, int]


class ImageDataset(Protocol):
    """Square images, numbered from 0, with the captions and labels that the recipe asks for."""

    @property
    def resolution(self) -> int:
        """Side, in pixels."""
        ...

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        ...

    @property
    def stream(self) -> Stream | None:
        """The shards they are streamed from; None where they lie on this machine."""
        ...

    @property
    def num_skipped(self) -> int:
        """How many broken images were left out."""
        ...

    @property
    def captions(self) -> Sequence[str] | None:
        """A text for each image; None where the recipe asks for none."""
        ...

    @property
    def labels(self) -> Sequence[int] | None:
        """A class for each image, from 0; None where the recipe asks for none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Sha256 over all that decides what a model is trained on: images, captions, labels, order, augmentation."""
        ...

    @property
    def example_fingerprint(self) -> str:
        """Sha256 over images, captions and labels, without augmentation; the reference's where it has images only."""
        ...

    @property
    def reference_fingerprint(self) -> str:
        """Sha256 over what ``image`` returns, in order; neither augmentation, captions nor labels are part of it."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...

    def image(self, index: int) -> torch.Tensor:
        """One image, centre-cropped: uint8 (C, resolution, resolution), 0..255."""
        ...

    def resized(self, index: int) -> ResizedImage:
        """One image before it is cropped."""
        ...


class SquareImages:
    """The inspected images of a source, decoded when they are asked for."""

    def __init__(
        self,
        source: ImageSource,
        inspection: Inspection,
        conditioning: Conditioning,
        spec: DatasetSpec,
        *,
        resolution: int,
        channels: int,
    ):
        self.resolution, self.channels = resolution, channels
        self.num_skipped = inspection.num_skipped
        self.captions, self.labels = conditioning.captions, conditioning.labels
        self._source, self._inspection, self._spec = source, inspection, spec
        self.stream: Stream | None = None
        if isinstance(source, StreamedTars):
            shards = torch.tensor(source.shard_of)[torch.tensor(inspection.indices)]
            self.stream = Stream(shards, spec.stream_window, source)

    def __len__(self) -> int:
        return len(self._inspection.indices)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the examples and of their augmentation."""
        augmentation: dict[str, Any] = {"crop": self._spec.crop, "random_flip": self._spec.random_flip}
        if self._spec.caption_dropout:
            augmentation["caption_dropout"] = self._spec.caption_dropout
        if self.stream is not None:  # It decides the order.
            counts = self.stream.shards.bincount().tolist()
            augmentation["stream"] = {"window": self._spec.stream_window, "images_per_shard": counts}
        return json_digest([self.example_fingerprint, augmentation])

    @cached_property
    def example_fingerprint(self) -> str:
        """Identity of images, captions and labels."""
        conditioning = {"captions": self.captions, "labels": self.labels}
        given = {name: list(values) for name, values in conditioning.items() if values is not None}
        if not given:
            return self.reference_fingerprint
        return json_digest([self.reference_fingerprint, given])

    @cached_property
    def reference_fingerprint(self) -> str:
        """Identity of what ``image`` returns. Names of files are no part of it, so a copy or a zip has the same."""
        pixels = {"version": PIXELS_VERSION, "resolution": self.resolution, "channels": self.channels}
        return json_digest([pixels, self._inspection.content])

    def image(self, index: int) -> torch.Tensor:
        """One image, centre-cropped: uint8 (C, resolution, resolution)."""
        pixels = self.resized(index).pixels
        return crop(pixels, center_corner(pixels, self.resolution), self.resolution)

    def resized(self, index: int) -> ResizedImage:
        """One image before it is cropped."""
        position = self._inspection.indices[index]
        try:
            encoded = self._source.read(position)
            if self.stream is None:  # Which looks itself, and brings anew what is not what it was.
                self._inspection.check(index, encoded)
            image = decode(encoded, channels=self.channels)
            return ResizedImage(resize(image, self.resolution), (image.height, image.width))
        except BrokenImageError as error:
            raise DatasetError(
                f"{self._source.name(position)} in {self._source.description} is not what it was before ({error}); "
                "leave the images as they are while a run uses them."
            ) from error


def load_images(spec: DatasetSpec, *, cache: Path, index_store: ObjectStore | None = None) -> ImageDataset:
    """Open a data set and verify that each of its images can be decoded.

    Args:
        spec: which images.
        cache: folder for downloads and for the results of the verification; may be deleted at any time.
        index_store: where the index of a data set that is streamed is kept, for other machines too.

    Raises:
        DatasetError: the images are missing, broken, too few, or cannot be loaded, or have not all the captions or
            labels that were asked for.
        StoreUnavailableError: their object store cannot be reached.
    """
    source = open_source(spec, cache / "images", index_store)
    inspection = inspect(
        source,
        num_images=spec.num_images,
        skip_broken=spec.skip_broken,
        channels=spec.num_channels,
        cache=cache / "images",
    )
    conditioning = read_conditioning(source, spec, inspection.indices)
    return SquareImages(source, inspection, conditioning, spec, resolution=spec.side, channels=spec.num_channels)
