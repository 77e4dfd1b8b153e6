"""A folder of image files."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from deme_core.errors import DatasetError
from deme_core.images.source import Column, folder_labels, is_image_name, stat_listing


class FolderSource:
    """All images below a folder, linked folders included, sorted by their path relative to it."""

    columns: Sequence[str] = ("label",)

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names = sorted(_image_names(root))
        self.description = f"the folder {root}"

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def listing(self) -> str | None:
        """Digest of names, sizes and times."""
        try:
            return stat_listing(((name, (self._root / name).stat()) for name in self._names), str(self._root.resolve()))
        except OSError:
            return None  # Such a file is named when it is read.

    def name(self, index: int) -> str:
        """Path relative to the folder."""
        return self._names[index]

    def read(self, index: int) -> bytes:
        """Read one file."""
        path = self._root / self._names[index]
        try:
            return path.read_bytes()
        except OSError as error:
            raise DatasetError(f"Cannot read {path} ({error.strerror}); make it readable or remove it.") from error

    def column(self, name: str) -> Column:
        """The folder that each image lies in."""
        return folder_labels(self._names)


def _image_names(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root, onerror=_refuse, followlinks=True):
        here = Path(folder)
        real = here.resolve()
        # A link to a folder above would be walked for ever.
        subfolders[:] = [name for name in subfolders if not real.is_relative_to((here / name).resolve())]
        prefix = here.relative_to(root)
        yield from filter(is_image_name, ((prefix / name).as_posix() for name in files))


def _refuse(error: OSError) -> NoReturn:
    raise DatasetError(f"Cannot read the folder {error.filename} ({error.strerror}); make it readable.") from error
