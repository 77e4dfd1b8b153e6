"""A look at a data set before a run: is it there, can its first image be decoded, has it captions and labels?"""

import math
from pathlib import Path

from deme_core.errors import DatasetError
from deme_core.file_store import FileStore
from deme_core.images.conditioning import read_conditioning
from deme_core.images.hub import count_rows
from deme_core.images.opening import open_source, open_stream
from deme_core.images.pixels import BrokenImageError, decode
from deme_core.images.source import ImageSource
from deme_core.recipe import DatasetSpec


def preview_images(spec: DatasetSpec, cache: Path) -> int | None:
    """Return how many images there are, as far as that is known without reading them all.

    What lies in an object store is brought into the cache; of a data set of the hub only its description is read,
    and of one that is streamed only the first tar.

    Args:
        spec: which images.
        cache: folder for downloads.

    Returns:
        Number of images, broken ones included; None where the hub does not say, or other tars hold more.

    Raises:
        DatasetError: there are none, the first is broken, or captions or labels that were asked for are missing.
        StoreUnavailableError: their object store cannot be reached.
    """
    if spec.source == "hub":
        num_images = count_rows(spec)
    elif spec.stream:
        num_images = _look_at_first_tar(spec, cache / "images")
    else:
        num_images = _look(open_source(spec, cache / "images"), spec)
    if num_images is None or spec.num_images is None:
        return num_images
    return min(num_images, spec.num_images)


def _look_at_first_tar(spec: DatasetSpec, cache: Path) -> int | None:
    stream = open_stream(spec, cache, FileStore(cache), num_images=0)  # To index all tars is to download them all.
    with stream.first_tar() as tar:
        found = _look(tar, spec)
    return found if stream.num_tars == 1 or found >= (spec.num_images or math.inf) else None


def _look(source: ImageSource, spec: DatasetSpec) -> int:
    if not len(source):
        raise DatasetError(f"There are no images in {source.description}; check dataset.path.")
    read_conditioning(source, spec, range(len(source))[: spec.num_images])
    if not spec.skip_broken:
        try:
            decode(source.read(0), channels=spec.num_channels)
        except BrokenImageError as error:
            raise DatasetError(f"{source.name(0)} in {source.description} cannot be decoded ({error}).") from error
    return len(source)
