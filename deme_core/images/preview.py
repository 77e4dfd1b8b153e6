"""A look at a data set before a run: is it there, can its first image be decoded, has it captions and labels?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deme_core.errors import DatasetError
from deme_core.file_store import FileStore
from deme_core.images.conditioning import read_conditioning
from deme_core.images.hub_preview import count_rows, first_rows
from deme_core.images.opening import open_source, open_stream
from deme_core.images.pixels import BrokenImageError, decode
from deme_core.images.source import ImageSource
from deme_core.recipe import DatasetSpec


@dataclass(frozen=True)
class Preview:
    """What is known of a data set without reading all of its images.

    Attributes:
        num_images: how many there are, broken ones included; None where the hub does not say, or other tars hold more.
        caption: of the first image; None where none was asked for or looked at.
        labels: the classes that there are; None where none were asked for, or not all images were looked at.
        class_names: the classes by number, where the order of their names numbers them.
        is_looked_at: whether any image was, and the columns beside it.
    """

    num_images: int | None
    caption: str | None = None
    labels: Sequence[int] | None = None
    class_names: Sequence[str] | None = None
    is_looked_at: bool = True


def preview_images(spec: DatasetSpec, cache: Path) -> Preview:
    """Look at a data set.

    What lies in an object store is brought into the cache; of a data set of the hub only its description is read, of a
    local folder of that kind only the first rows, and of one that is streamed only the first tar.

    Args:
        spec: which images.
        cache: folder for downloads.

    Raises:
        DatasetError: there are none, the first is broken, or captions or labels that were asked for are missing.
        StoreUnavailableError: their object store cannot be reached.
    """
    if spec.source == "hub":
        num_images, rows = count_rows(spec), first_rows(spec)
        found = Preview(None, is_looked_at=False) if rows is None else replace(_look(rows, spec), labels=None)
        found = replace(found, num_images=num_images)
    elif spec.stream:
        found = _look_at_first_tar(spec, cache / "images")
    else:
        found = _look(open_source(spec, cache / "images"), spec)
    if found.num_images is None or spec.num_images is None:
        return found
    return replace(found, num_images=min(found.num_images, spec.num_images))


def _look_at_first_tar(spec: DatasetSpec, cache: Path) -> Preview:
    stream = open_stream(spec, cache, FileStore(cache), num_images=0)  # To index all tars is to download them all.
    with stream.first_tar() as tar:
        found = _look(tar, spec)
    assert found.num_images is not None
    is_all = stream.num_tars == 1 or found.num_images >= (spec.num_images or math.inf)
    return found if is_all else replace(found, num_images=None, labels=None)


def _look(source: ImageSource, spec: DatasetSpec) -> Preview:
    if not len(source):
        raise DatasetError(f"There are no images in {source.description}; check dataset.path.")
    told = read_conditioning(source, spec, range(len(source))[: spec.num_images])
    if not spec.skip_broken:
        try:
            decode(source.read(0), channels=spec.num_channels)
        except BrokenImageError as error:
            raise DatasetError(f"{source.name(0)} in {source.description} cannot be decoded ({error}).") from error
    labels = None if told.labels is None else sorted(set(told.labels))
    return Preview(len(source), told.captions[0] if told.captions else None, labels, told.class_names)
