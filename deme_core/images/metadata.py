"""metadata.jsonl: what a folder of images says of each of them, as datasets' imagefolder reads it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

from deme_core.errors import DatasetError
from deme_core.images.source import LABEL, Column, first_names, folder_labels, is_hidden

METADATA_NAME = "metadata.jsonl"
FILE_NAME = "file_name"


def is_metadata_name(name: str) -> bool:
    """Whether a relative POSIX path names a metadata file that is not hidden."""
    return PurePosixPath(name).name == METADATA_NAME and not is_hidden(name)


def read_columns(names: Sequence[str], files: Mapping[str, bytes], *, source: str) -> dict[str, Column]:
    """Read all columns of a folder of images.

    Without a column of that name, ``label`` is the sub-folder that an image lies in.

    Args:
        names: paths of the images, relative to the folder.
        files: content of each metadata file by its path, relative to the folder.
        source: what messages call the folder.

    Returns:
        ``label``, then the other columns in the order in which the files first name them.

    Raises:
        DatasetError: a file is no JSON lines, names no or absent images, or two lines name the same one.
    """
    positions = {name: index for index, name in enumerate(names)}
    columns: dict[str, list[Any]] = {}
    seen: set[int] = set()
    for path, content in sorted(files.items()):
        called = f"{path} in {source}"
        rows = list(_rows(content, PurePosixPath(path).parent, called))
        _refuse_absent([name for name, _, _ in rows if name not in positions], called)
        for name, number, row in rows:
            index = positions[name]
            if index in seen:
                raise DatasetError(f"{called} has in line {number} another row of {name}; keep one row for each image.")
            seen.add(index)
            for key, value in row.items():
                columns.setdefault(key, [None] * len(names))[index] = value
    return {LABEL: folder_labels(names)} | {key: Column(values) for key, values in columns.items()}


def _rows(content: bytes, parent: PurePosixPath, called: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield the image's path relative to the folder, the number of the line, and its other values."""
    for number, line in enumerate(BytesIO(content), start=1):  # No list of lines, which may all be empty.
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", "not UTF-8")
            raise DatasetError(
                f"{called} is no JSON lines (line {number}: {reason}); write one JSON "
                f"object with {FILE_NAME} in each line."
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get(FILE_NAME), str):
            raise DatasetError(
                f"{called} has in line {number} no JSON object with a text {FILE_NAME}; give each line the path of an "
                "image, relative to this file."
            )
        yield normpath(parent / row.pop(FILE_NAME)), number, row


def _refuse_absent(absent: Sequence[str], called: str) -> None:
    if absent:
        raise DatasetError(
            f"{called} names {len(absent)} images that are not there ({first_names(absent)}); add the files, "
            "or remove their lines."
        )
