"""A folder of image files."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from deme_core.errors import DatasetError
from deme_core.images.metadata import is_metadata_name, read_columns
from deme_core.images.source import Column, is_image_name, stat_listing


class FolderSource:
    """All images below a folder, linked folders included, sorted by their path relative to it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        files = sorted(_file_names(root))
        self._names = [name for name in files if is_image_name(name)]
        self._metadata_names = [name for name in files if is_metadata_name(name)]
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
        return self._content(self._names[index])

    @property
    def columns(self) -> Sequence[str]:
        """Keys of the metadata, and the folder that an image lies in."""
        return list(self._columns)

    def column(self, name: str) -> Column | None:
        """One key of the metadata, or the folders."""
        return self._columns.get(name)

    @cached_property
    def _columns(self) -> dict[str, Column]:
        files = {name: self._content(name) for name in self._metadata_names}
        return read_columns(self._names, files, source=self.description)

    def _content(self, name: str) -> bytes:
        path = self._root / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise DatasetError(f"Cannot read {path} ({error.strerror}); make it readable or remove it.") from error


def _file_names(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root, onerror=_refuse, followlinks=True):
        here = Path(folder)
        real = here.resolve()
        # A link to a folder above would be walked for ever.
        subfolders[:] = [name for name in subfolders if not real.is_relative_to((here / name).resolve())]
        prefix = here.relative_to(root)
        yield from ((prefix / name).as_posix() for name in files)


def _refuse(error: OSError) -> NoReturn:
    raise DatasetError(f"Cannot read the folder {error.filename} ({error.strerror}); make it readable.") from error
