"""Where encoded images lie: the one interface of folders, zips, data sets of the hub and the digits."""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

from deme_core.digests import json_digest

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"})
SETTLED_AFTER_SEC = 2.0
LABEL = "label"
NUM_NAMED = 3


@dataclass(frozen=True)
class Column:
    """What a source says of each of its images beside the pixels, such as a caption.

    Attributes:
        values: one for each image of the source, in order; None where there is none.
        class_names: what the values, which then are numbers from 0, stand for.
    """

    values: Sequence[Any]
    class_names: Sequence[str] | None = None


class ImageSource(Protocol):
    """Encoded images in a fixed order. Must survive fork and pickling, for the workers of a DataLoader."""

    @property
    def description(self) -> str:
        """What messages call it."""
        ...

    @property
    def listing(self) -> str | None:
        """Digest that changes when any image may have changed, had without reading them; None: not to be had."""
        ...

    def __len__(self) -> int:
        """Number of images, broken ones included."""
        ...

    def name(self, index: int) -> str:
        """What messages call the image."""
        ...

    def read(self, index: int) -> bytes:
        """Encoded image; DatasetError if it cannot be read, BrokenImageError if it is damaged."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """Names of what the source says of its images, for messages; may have to read all of it."""
        ...

    def column(self, name: str) -> Column | None:
        """One of ``columns``; None if there is no such one, DatasetError if it cannot be read."""
        ...


def is_image_name(name: str) -> bool:
    """Whether a relative POSIX path names an image: not hidden, nor one of macOS's ``__MACOSX`` companions."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a relative POSIX path or a folder of it begins with a dot, or is one of macOS's companions."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def first_names(names: Sequence[str]) -> str:
    """Return the first three names, for a message, and a sign where there are more."""
    return ", ".join([*names[:NUM_NAMED], *(["…"] if len(names) > NUM_NAMED else [])])


def folder_labels(names: Sequence[str]) -> Column:
    """Label images by the folder they lie in, as datasets' imagefolder does: the folders sorted are the classes."""
    folders = [PurePosixPath(name).parent.name for name in names]
    class_names = sorted(set(filter(None, folders)))
    numbers = {folder: number for number, folder in enumerate(class_names)}
    return Column([numbers.get(folder) for folder in folders], class_names)


def stat_listing(files: Iterable[tuple[str, os.stat_result]], *extra: str) -> str | None:
    """Digest names, sizes and times of files; None while one of them is too new to tell its next change by its time."""
    # ctime beside mtime: copying tools restore mtime, none can set ctime.
    rows = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in files]
    newest_ns = max((max(row[2:]) for row in rows), default=0)
    if time.time_ns() - newest_ns < SETTLED_AFTER_SEC * 1e9:
        return None
    return json_digest([rows, extra])
