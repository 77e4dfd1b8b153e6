"""Image data sets: square uint8 images under a fingerprint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import torch

from deme_core.digests import canonical_json, sha256_bytes
from deme_core.errors import DatasetError
from deme_core.file_store import FileStore
from deme_core.images.archive import ZipSource
from deme_core.images.conditioning import Conditioning, read_conditioning
from deme_core.images.digits import DigitsSource
from deme_core.images.folder import FolderSource
from deme_core.images.hub import HubSource
from deme_core.images.inspection import Inspection, inspect
from deme_core.images.pixels import PIXELS_VERSION, BrokenImageError, center_corner, crop, decode, resize
from deme_core.images.remote import IMAGES, TARS, FileKind, fetch_images, list_tars
from deme_core.images.source import ImageSource
from deme_core.images.stream import Stream, StreamedTars
from deme_core.images.tars import TarSource, find_tars
from deme_core.local_files import user_path
from deme_core.recipe import DEFAULT_IMAGE_COLUMN, DatasetSpec
from deme_core.store import ObjectStore

FetchPrefix = Callable[[str, Path, FileKind, int | None], Path]


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
    def label_names(self) -> Sequence[str] | None:
        """Names of the classes; None without labels, or where the source knows numbers only."""
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
        self.label_names = conditioning.label_names
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
        return sha256_bytes(canonical_json([self.example_fingerprint, augmentation]).encode())

    @cached_property
    def example_fingerprint(self) -> str:
        """Identity of images, captions and labels."""
        conditioning = {"captions": self.captions, "labels": self.labels}
        given = {name: list(values) for name, values in conditioning.items() if values is not None}
        if not given:
            return self.reference_fingerprint
        return sha256_bytes(canonical_json([self.reference_fingerprint, given]).encode())

    @cached_property
    def reference_fingerprint(self) -> str:
        """Identity of what ``image`` returns. Names of files are no part of it, so a copy or a zip has the same."""
        pixels = {"version": PIXELS_VERSION, "resolution": self.resolution, "channels": self.channels}
        return sha256_bytes(canonical_json([pixels, self._inspection.content]).encode())

    def image(self, index: int) -> torch.Tensor:
        """One image, centre-cropped: uint8 (C, resolution, resolution)."""
        pixels = self.resized(index).pixels
        return crop(pixels, center_corner(pixels, self.resolution), self.resolution)

    def resized(self, index: int) -> ResizedImage:
        """One image before it is cropped."""
        position = self._inspection.indices[index]
        try:
            image = decode(self._source.read(position), channels=self.channels)
            return ResizedImage(resize(image, self.resolution), (image.height, image.width))
        except BrokenImageError as error:
            raise DatasetError(
                f"{self._source.name(position)} in {self._source.description} was sound and now is not ({error}); "
                "leave the images as they are while a run uses them."
            ) from error


def load_images(
    spec: DatasetSpec,
    *,
    cache: Path,
    fetch_prefix: FetchPrefix = fetch_images,
    index_store: ObjectStore | None = None,
) -> ImageDataset:
    """Open a data set and verify that each of its images can be decoded.

    Args:
        spec: which images.
        cache: folder for downloads and for the results of the verification; may be deleted at any time.
        fetch_prefix: brings an object-store URI to a local folder, zip or tar below ``cache``, see `fetch_images`.
        index_store: where the index of a data set that is streamed is kept, for other machines too.

    Raises:
        DatasetError: the images are missing, broken, too few, or cannot be loaded, or have not all the captions or
            labels that were asked for.
        StoreUnavailableError: their object store cannot be reached.
    """
    source = open_source(spec, cache / "images", fetch_prefix, index_store)
    inspection = inspect(
        source,
        num_images=spec.num_images,
        skip_broken=spec.skip_broken,
        channels=spec.num_channels,
        cache=cache / "images",
    )
    conditioning = read_conditioning(source, spec, inspection.indices)
    return SquareImages(source, inspection, conditioning, spec, resolution=spec.side, channels=spec.num_channels)


def open_source(
    spec: DatasetSpec,
    cache: Path,
    fetch_prefix: FetchPrefix = fetch_images,
    index_store: ObjectStore | None = None,
) -> ImageSource:
    """Open where encoded images lie, without reading them; see `load_images`.

    Args:
        spec: which images.
        cache: folder for downloads.
        fetch_prefix: brings an object-store URI to a local folder, zip or tar below ``cache``, see `fetch_images`.
        index_store: where the index of a data set that is streamed is kept; default in the cache.

    Raises:
        DatasetError: there are no such images.
        StoreUnavailableError: their object store cannot be reached.
    """
    if spec.source == "digits":
        return DigitsSource()
    if spec.source == "hub":
        return HubSource(spec)
    if spec.stream:
        return open_stream(spec, cache, index_store or FileStore(cache), spec.num_images)
    if spec.source == "webdataset":
        return _open_tars(spec, _local_path(str(spec.path), lambda uri: fetch_prefix(uri, cache, TARS, None)))
    path = _local_path(str(spec.path), lambda uri: fetch_prefix(uri, cache, IMAGES, _num_needed(spec)))
    if path.is_dir():
        return FolderSource(path)
    if path.suffix.lower() == ".zip" and path.is_file():
        return ZipSource(path)
    if path.exists():
        raise DatasetError(f"{path} is neither a folder nor a zip; unpack it, and set dataset.path to the folder.")
    raise DatasetError(f"There is no folder or zip {path.absolute()}; check dataset.path.")


def _num_needed(spec: DatasetSpec) -> int | None:
    """Returns how many files, from the first, are all that is looked at; None: perhaps all.

    Another one takes the place of a broken one that is skipped; classes are numbered, and metadata is checked, by all.
    """
    needs_all = spec.skip_broken or spec.caption_column or spec.caption_template or spec.label_column
    return None if needs_all else spec.num_images


def open_stream(spec: DatasetSpec, cache: Path, index_store: ObjectStore, num_images: int | None) -> StreamedTars:
    """Open tars in an object store, and index those of the first images.

    Args:
        spec: which tars.
        cache: folder for copies.
        index_store: where the index is, or will be.
        num_images: see `StreamedTars`.

    Raises:
        DatasetError: there are none, one cannot be used, or the cache cannot hold a window.
        StoreUnavailableError: a store cannot be reached.
    """
    store, tars = list_tars(str(spec.path))
    return StreamedTars(
        tars,
        store,
        cache=cache,
        index_store=index_store,
        cache_gb=spec.cache_gb,
        window=spec.stream_window,
        channels=spec.num_channels,
        num_images=num_images,
        image_column=None if spec.image_column == DEFAULT_IMAGE_COLUMN else spec.image_column,
    )


def _open_tars(spec: DatasetSpec, path: Path) -> ImageSource:
    if not path.exists():
        raise DatasetError(f"There is no folder or tar {path.absolute()}; check dataset.path.")
    tars, root = find_tars(path)
    return TarSource(tars, root, None if spec.image_column == DEFAULT_IMAGE_COLUMN else spec.image_column)


def _local_path(path: str, fetch: Callable[[str], Path]) -> Path:
    if path.startswith("file:///"):
        return Path(unquote(urlsplit(path).path))
    if path.startswith("s3://"):
        return fetch(path)
    if "://" in path:
        raise DatasetError("dataset.path must be a folder, a zip or tar, file:///PATH or s3://BUCKET/PREFIX.")
    return user_path(path)
