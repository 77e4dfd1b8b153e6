"""Where the encoded images of a recipe lie: opened, and not read yet."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from deme_core.errors import DatasetError
from deme_core.file_store import FileStore
from deme_core.images.archive import ZipSource
from deme_core.images.digits import DigitsSource
from deme_core.images.folder import FolderSource
from deme_core.images.hub import HubSource
from deme_core.images.remote import IMAGES, TARS, FileKind, fetch_images, list_tars
from deme_core.images.source import ImageSource
from deme_core.images.stream import StreamedTars
from deme_core.images.tars import TarSource, find_tars
from deme_core.local_files import user_path
from deme_core.recipe import DEFAULT_IMAGE_COLUMN, DatasetSpec
from deme_core.store import ObjectStore


def open_source(spec: DatasetSpec, cache: Path, index_store: ObjectStore | None = None) -> ImageSource:
    """Open where encoded images lie, without reading them; what is in an object store is fetched.

    Args:
        spec: which images.
        cache: folder for downloads.
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
        return _open_tars(spec, _local_path(str(spec.path), cache, TARS))
    path = _local_path(str(spec.path), cache, IMAGES, _num_needed(spec))
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
        raise DatasetError(
            f"There is no folder or tar {path.absolute()}; check dataset.path, which is a folder of tars or one tar, "
            "and no pattern of names."
        )
    tars, root = find_tars(path)
    return TarSource(tars, root, None if spec.image_column == DEFAULT_IMAGE_COLUMN else spec.image_column)


def _local_path(path: str, cache: Path, kind: FileKind, num_files: int | None = None) -> Path:
    if path.startswith("file:///"):
        return Path(unquote(urlsplit(path).path))
    if path.startswith("s3://"):
        return fetch_images(path, cache, kind, num_files)
    if "://" in path:
        raise DatasetError("dataset.path must be a folder, a zip or tar, file:///PATH or s3://BUCKET/PREFIX.")
    return user_path(path)
