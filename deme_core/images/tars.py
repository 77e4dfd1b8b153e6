"""Tars as webdataset lays them out: the members ``key.jpg``, ``key.txt``, ``key.json``, ``key.cls`` are one sample.

The tars are indexed once and read in place. The library ``webdataset`` reads them in sequence and shuffles in a buffer;
batches that any number resumes need any image at any time instead, and for that ``tarfile`` is enough.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self

from deme_core.errors import DatasetError
from deme_core.images.source import IMAGE_SUFFIXES, LABEL, Column, folder_labels, is_hidden, stat_listing

TEXTS, CLASSES, JSON = ("txt", "text"), ("cls",), "json"
TAR_SUFFIX = ".tar"
# Headers that tell more of the next member, such as a long name, are read whole before that.
_EXTENDING = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MAX_EXTENDING_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Member:
    """Where the bytes of one member lie in its tar; and what they are, if that is known already."""

    tar: int
    offset: int
    size: int
    content: bytes | None = None


@dataclass(slots=True)
class Sample:
    """The members of one key, by extension."""

    tar: int
    key: str
    members: dict[str, Member]
    image: str = ""


class _BoundedHeader(tarfile.TarInfo):
    """A header that makes ``tarfile`` neither read any number of bytes into memory nor go back."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Take a header from its block; ReadError if its size cannot be meant."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDING and header.size > _MAX_EXTENDING_BYTES):
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


class TarSource:
    """The samples with an image of one or several tars: tars by name, samples as they lie in them.

    Args:
        tars: the files.
        root: the folder that names are relative to.
        image_column: extension of the images; None for the one image of each sample.
        file: the only tar, already open; it is then read through this alone.

    Raises:
        DatasetError: a tar is damaged or compressed, or a sample has several images or two members of one name.
    """

    _file: BinaryIO | None = None

    def __init__(
        self, tars: Sequence[Path], root: Path, image_column: str | None = None, file: BinaryIO | None = None
    ) -> None:
        self._tars, self._root, self._image_column, self._file = list(tars), root, image_column, file
        self.description = f"the tar {tars[0]}" if len(tars) == 1 else f"the {len(tars)} tars in {root}"
        self._samples: list[Sample] = []
        for number, tar in enumerate(self._tars):
            for sample in _samples(tar, number, file).values():
                if extension := self._image_extension(sample):
                    sample.image = extension
                    self._samples.append(sample)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def samples(self) -> Sequence[Sample]:
        """All samples, in order."""
        return self._samples

    @cached_property
    def listing(self) -> str | None:
        """Digest of the tars' names, sizes and times."""
        return stat_listing(((str(tar.resolve()), tar.stat()) for tar in self._tars), self._image_column or "")

    def name(self, index: int) -> str:
        """Path of the tar and of the image in it."""
        sample = self._samples[index]
        return f"{self._tars[sample.tar].relative_to(self._root).as_posix()}/{sample.key}.{sample.image}"

    def read(self, index: int) -> bytes:
        """Read the image of one sample."""
        sample = self._samples[index]
        return self.read_member(sample.members[sample.image])

    @property
    def columns(self) -> Sequence[str]:
        """Extensions of texts and classes, keys of the JSON objects, and the folder that an image lies in."""
        extensions = dict.fromkeys(name for sample in self._samples for name in sample.members)
        keys = dict.fromkeys(key for sample in self._samples for key in self._json(sample))
        return [name for name in extensions if name in (*TEXTS, *CLASSES)] + list(keys | {LABEL: None})

    def column(self, name: str) -> Column | None:
        """What the members of one extension hold; without such members, one key of the JSON objects."""
        if name in (*TEXTS, *CLASSES) and any(name in sample.members for sample in self._samples):
            return Column([self._text(sample, name) for sample in self._samples])
        values = [self._json(sample).get(name) for sample in self._samples]
        if any(value is not None for value in values):
            return Column(values)
        return folder_labels([sample.key for sample in self._samples]) if name == LABEL else None

    def _text(self, sample: Sample, extension: str) -> str | int | None:
        member = sample.members.get(extension)
        if member is None:
            return None
        try:
            text = self.read_member(member).decode("utf-8-sig")
            return int(text) if extension in CLASSES else text
        except ValueError as error:
            kind = "no whole number" if extension in CLASSES else "not UTF-8"
            raise DatasetError(f"{self._member_name(sample, extension)} is {kind}; pack the tar anew.") from error

    def _json(self, sample: Sample) -> dict[str, Any]:
        member = sample.members.get(JSON)
        if member is None:
            return {}
        try:
            content = json.loads(self.read_member(member))
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else "no JSON"
            raise DatasetError(f"{self._member_name(sample, JSON)} is {reason}; pack the tar anew.") from error
        return content if isinstance(content, dict) else {}

    def _member_name(self, sample: Sample, extension: str) -> str:
        return f"{self._tars[sample.tar]}/{sample.key}.{extension}"

    def read_member(self, member: Member) -> bytes:
        """Read the bytes of one member."""
        try:
            content = self._pread(self._tars[member.tar], member)
        except OSError as error:
            raise DatasetError(f"Cannot read {self._tars[member.tar]} ({error.strerror}).") from error
        if len(content) < member.size:
            raise DatasetError(f"{self._tars[member.tar]} was cut short; leave it as it is while a run uses it.")
        return content

    def _pread(self, tar: Path, member: Member) -> bytes:
        """Read a member, or what there is of it."""
        # Opened anew each time: processes would share one handle, and tars may be more than a process may hold.
        with nullcontext(self._file) if self._file is not None else tar.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), member.size, member.offset)

    def _image_extension(self, sample: Sample) -> str | None:
        if self._image_column is not None:
            return self._image_column if self._image_column in sample.members else None
        images = [name for name in sample.members if f".{name.lower()}" in IMAGE_SUFFIXES]
        if len(images) > 1:
            raise DatasetError(
                f"{self._tars[sample.tar]} has several images of the sample {sample.key} ({', '.join(images)}); set "
                "dataset.image_column to the extension of those to use."
            )
        return images[0] if images else None


def find_tars(path: Path) -> tuple[list[Path], Path]:
    """Return the tar, or all tars below a folder by their path relative to it, and the folder.

    Raises:
        DatasetError: there is none.
    """
    if path.is_file():
        return [path], path.parent
    found = {tar.relative_to(path).as_posix(): tar for tar in path.rglob("*") if tar.is_file()}
    names = sorted(filter(is_tar_name, found))
    if not names:
        raise DatasetError(f"There is no {TAR_SUFFIX} at {path}; check dataset.path.")
    return [found[name] for name in names], path


def is_tar_name(name: str) -> bool:
    """Whether a relative POSIX path names a tar that is not hidden."""
    return name.lower().endswith(TAR_SUFFIX) and not is_hidden(name)


def _samples(tar: Path, number: int, file: BinaryIO | None) -> dict[str, Sample]:
    """Return the samples of one tar by key, in the order in which their first members lie in it."""
    samples: dict[str, Sample] = {}
    for member in _members(tar, file):
        path = PurePosixPath(member.name)
        stem, _, extension = path.name.lower().partition(".")
        if not extension or is_hidden(member.name):
            continue
        key = (path.parent / path.name[: len(stem)]).as_posix()
        sample = samples.setdefault(key, Sample(number, key, {}))
        if extension in sample.members:
            raise DatasetError(f"{tar} has two members {key}.{extension}; pack it with one for each sample.")
        sample.members[extension] = Member(number, member.offset_data, member.size)
    return samples


def _members(tar: Path, file: BinaryIO | None) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(tar, "r:", file, tarinfo=_BoundedHeader) as archive:
            for member in archive:
                if member.size < 0:  # As a pax header may have it; what follows it would lie before it.
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                member.pax_headers = {}  # Each has a copy of the global ones, and tarfile keeps all members.
                if member.isreg() and not member.issparse():
                    yield member
    except MemoryError:
        raise
    except Exception as error:  # tarfile answers damage with nearly any exception.
        reason = getattr(error, "strerror", None) or "it is damaged, compressed or no tar"
        raise DatasetError(f"Cannot read the tar {tar} ({reason}); give a whole, uncompressed tar.") from error
