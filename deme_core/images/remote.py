"""Image files in an object store, brought into the local cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deme_core.downloads import download_once, listing_version
from deme_core.errors import DatasetError, InputError, StoreUnavailableError
from deme_core.images.metadata import is_metadata_name
from deme_core.images.source import is_image_name
from deme_core.images.tars import TAR_SUFFIX, is_tar_name
from deme_core.store import ObjectStore, StoredObject, folder_and_key, open_store


@dataclass(frozen=True)
class FileKind:
    """What is looked for below a prefix.

    Attributes:
        what: what messages call one such file.
        packed_suffix: a URI with this ending is one file that holds all images.
        is_wanted: whether a key below a prefix is needed.
        is_enough: whether a key makes the prefix a data set.
    """

    what: str
    packed_suffix: str
    is_wanted: Callable[[str], bool]
    is_enough: Callable[[str], bool]


IMAGES = FileKind("image", ".zip", lambda key: is_image_name(key) or is_metadata_name(key), is_image_name)
TARS = FileKind("tar", TAR_SUFFIX, is_tar_name, is_tar_name)


def fetch_images(uri: str, cache: Path, kind: FileKind = IMAGES, num_files: int | None = None) -> Path:
    """Download the images below an object-store prefix, or one file that holds them all.

    What an earlier call has already brought is kept, whole files only, also when that call was killed; so the folder
    may hold more than ``num_files``.

    Args:
        uri: ``s3://bucket/prefix``, or ``s3://bucket/name.zip`` or ``.tar``.
        cache: where downloads are kept, each version of the prefix in a folder of its own.
        kind: image files and their metadata, or tars.
        num_files: bring only the first so many below a prefix, in the order of a folder, and no metadata; None: all.

    Returns:
        The local folder, or the local zip or tar.

    Raises:
        DatasetError: there is no such file, or no such kind of URI.
        StoreUnavailableError: the store cannot be reached.
    """
    is_packed = uri.lower().endswith(kind.packed_suffix)
    parent, name = folder_and_key(uri) if is_packed else (uri, "")
    store = _open(parent)
    objects = [o for o in store.list(name) if (o.key == name if is_packed else kind.is_wanted(o.key))]
    if not any(is_packed or kind.is_enough(o.key) for o in objects):
        what = f"such {kind.packed_suffix[1:]}" if is_packed else kind.what
        raise DatasetError(f"There is no {what} at {uri}; check dataset.path.")
    folder = cache / "downloads" / listing_version(uri, objects)
    if num_files is not None and not is_packed:
        objects = sorted((o for o in objects if kind.is_enough(o.key)), key=lambda o: o.key)[:num_files]
    return download_once(store, objects, folder) / name


def list_tars(uri: str) -> tuple[ObjectStore, list[StoredObject]]:
    """List the tars below an object-store prefix, without reading them.

    Returns:
        The store of the prefix, and the tars in it.

    Raises:
        DatasetError: there are none, or that is no URI of an object store.
        StoreUnavailableError: the store cannot be reached.
    """
    store = _open(uri)
    tars = [found for found in store.list("") if is_tar_name(found.key)]
    if not tars:
        raise DatasetError(f"There is no {TARS.what} at {uri}; check dataset.path.")
    return store, tars


def _open(uri: str) -> ObjectStore:
    try:
        return open_store(uri)
    except StoreUnavailableError:
        raise
    except InputError as error:
        raise DatasetError("dataset.path is no object-store URI; give s3://BUCKET/PREFIX.") from error
