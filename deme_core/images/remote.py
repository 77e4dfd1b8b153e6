"""Image files in an object store, brought into the local cache."""

from pathlib import Path

from deme_core.downloads import download_once, listing_version
from deme_core.errors import DatasetError, InputError, StoreUnavailableError
from deme_core.images.source import is_image_name
from deme_core.store import ObjectStore, open_store


def fetch_images(uri: str, cache: Path) -> Path:
    """Download the images below an object-store prefix, or one zip.

    What an earlier call has already brought is kept, whole files only, also when that call was killed.

    Args:
        uri: ``s3://bucket/prefix`` or ``s3://bucket/name.zip``.
        cache: where downloads are kept, each version of the prefix in a folder of its own.

    Returns:
        The local folder, or the local zip.

    Raises:
        DatasetError: there is no image, or no such kind of URI.
        StoreUnavailableError: the store cannot be reached.
    """
    is_zip = uri.lower().endswith(".zip")
    parent, _, name = uri.rpartition("/") if is_zip else (uri, "", "")
    store = _open(parent)
    objects = [o for o in store.list(name) if (o.key == name if is_zip else is_image_name(o.key))]
    if not objects:
        raise DatasetError(f"There is no {'such zip' if is_zip else 'image'} at {uri}; check dataset.path.")
    return download_once(store, objects, cache / "downloads" / listing_version(uri, objects)) / name


def _open(uri: str) -> ObjectStore:
    try:
        return open_store(uri)
    except StoreUnavailableError:
        raise
    except InputError as error:
        raise DatasetError("dataset.path is no object-store URI; give s3://BUCKET/PREFIX.") from error
