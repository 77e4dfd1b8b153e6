"""A zip of image files, read in place: nothing is unpacked, so nothing can be written where it should not be."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from deme_core.errors import DatasetError
from deme_core.images.metadata import is_metadata_name, read_columns
from deme_core.images.pixels import BrokenImageError
from deme_core.images.source import Column, is_image_name, stat_listing

# A few kilobytes of a zip may inflate to any size; no encoded image takes so much, nor do all metadata together.
_MAX_BYTES = 2**29


class ZipSource:
    """All images of a zip, sorted by their path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.description = f"the zip {path}"
        self._open()
        self._names = sorted({name for name in self._zip.namelist() if is_image_name(name)})
        self._refuse_unusable()

    def __len__(self) -> int:
        return len(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return ZipSource, (self._path,)

    @cached_property
    def listing(self) -> str | None:
        """Digest of the zip's own path, size and times."""
        return stat_listing([(str(self._path.resolve()), self._path.stat())])

    def name(self, index: int) -> str:
        """Path within the zip."""
        return self._names[index]

    def read(self, index: int) -> bytes:
        """Read one member and check its CRC."""
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
        names = set(filter(is_metadata_name, self._zip.namelist()))
        try:
            if (size := sum(self._zip.getinfo(name).file_size for name in names)) > _MAX_BYTES:
                raise BrokenImageError(f"inflate to {size} bytes")
            files = {name: self._content(name) for name in names}
            return read_columns(self._names, files, source=self.description)
        except BrokenImageError as error:
            raise DatasetError(f"The metadata in {self.description} cannot be read ({error}); pack it anew.") from error

    def _content(self, name: str) -> bytes:
        if self._process != os.getpid():
            self._open()  # Processes that share a file handle move each other's position.
        try:
            if (size := self._zip.getinfo(name).file_size) > _MAX_BYTES:
                raise BrokenImageError(f"inflates to {size} bytes")
            return self._zip.read(name)  # Never more than it declares.
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise BrokenImageError("damaged in the zip") from error
        except KeyError as error:  # Another process had opened another zip of this name.
            raise BrokenImageError("not in the zip any more") from error
        except NotImplementedError as error:  # Of strong encryption and patches, which have flags of their own.
            raise BrokenImageError("packed in a way that is not read") from error
        except OSError as error:
            raise DatasetError(f"Cannot read {self.description} ({error.strerror or error}).") from error

    def _open(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self._path)
        # A later version of the format is not implemented, a name that is not UTF-8 a ValueError.
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is damaged or no zip"
            raise DatasetError(f"Cannot read {self.description} ({reason}); check dataset.path.") from error
        self._process = os.getpid()

    def _refuse_unusable(self) -> None:
        for member in self._zip.infolist():
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise DatasetError(
                    f"{self._path} has the unsafe member {member.filename!r}; pack it with relative paths."
                )
            if member.flag_bits & 1:
                raise DatasetError(f"{self._path} is encrypted; pack it without a password.")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DatasetError(f"{self._path} uses another compression than deflate; pack it with deflate.")
