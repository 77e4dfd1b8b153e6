"""A data set of the Hugging Face hub, or a local folder that ``datasets.load_dataset`` understands."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any

from deme_core.errors import DatasetError, first_line
from deme_core.images.pixels import BrokenImageError
from deme_core.images.source import Column, first_names, stat_listing
from deme_core.local_files import user_path
from deme_core.recipe import DatasetSpec


class HubSource:
    """The images of one column of one split, in the order of its rows; or of ``table``, some of its rows."""

    def __init__(self, spec: DatasetSpec, table: Any = None) -> None:
        self.description = f"split '{spec.split}' of the data set {spec.path}"
        self._column = spec.image_column
        self._table = _load(spec) if table is None else table
        self._images = _undecoded(self._table, self._column, self.description)
        self._folders = [folder.resolve() for folder in _own_folders(spec)]
        self.listing = _listing(self._images, spec)

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Number of the row, from 0."""
        return f"row {index}"

    def read(self, index: int) -> bytes:
        """Encoded image, from the table or from the file it refers to, which must be one of the data set's."""
        value = self._images[index][self._column] or {}
        encoded, path = value.get("bytes"), value.get("path")
        if encoded is not None:
            return encoded
        if path is None:
            raise BrokenImageError("no image in this row")
        try:
            file = Path(os.path.realpath(path))
            if any(map(file.is_relative_to, self._folders)) and S_ISREG(file.stat().st_mode):
                return file.read_bytes()
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"Row {index} of {self.description} refers to {path}, which cannot be read "
                f"({getattr(error, 'strerror', error)}); load the data set anew."
            ) from error
        raise DatasetError(
            f"Row {index} of {self.description} refers to {path}, which is no file in the data set's folder or in the "
            "caches of the hub; put the images into the data set, or use dataset.source: imagefolder."
        )

    @property
    def columns(self) -> Sequence[str]:
        """All columns but the images."""
        return [name for name in self._table.column_names if name != self._column]

    def column(self, name: str) -> Column | None:
        """One column, with the names of its classes where it has them."""
        if name not in self.columns:
            return None
        names = getattr(self._table.features[name], "names", None)
        # As Arrow has them: of a column of images, which Pillow would open, datasets itself gives pixels.
        return Column(self._table.with_format("arrow")[name][:].to_pylist(), names)


def _own_folders(spec: DatasetSpec) -> Iterator[Path]:
    """Yield where the files of a data set lie: any other that a row names is of this machine, and no business of its.

    These are its own folder, and those that ``datasets`` and the client of the hub bring files into.
    """
    from datasets import config
    from huggingface_hub import constants

    if (folder := user_path(str(spec.path))).is_dir():
        yield folder
    yield from map(Path, (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH))
    yield Path(constants.HF_HUB_CACHE)


def _load(spec: DatasetSpec) -> Any:
    import datasets

    try:
        builder = open_builder(spec)
        if not _restrict(builder, spec):
            return datasets.load_dataset(_location(spec), name=spec.name, split=spec.split)
        builder.download_and_prepare()
        return builder.as_dataset(spec.split)
    except DatasetError:
        raise
    except Exception as error:  # Builders, file systems and HTTP clients each raise their own.
        raise cannot_load(spec, error) from error


def open_builder(spec: DatasetSpec) -> Any:
    """Return what ``datasets`` makes of a data set, in the cache of the wanted split where it can be prepared alone.

    Without the hub that is what was cached, of the split or of the whole.
    """
    import datasets

    cache = _split_cache(spec)
    try:
        builder = datasets.load_dataset_builder(_location(spec), name=spec.name, cache_dir=cache)
    except Exception:
        if cache is None:
            raise
        whole = datasets.load_dataset_builder(_location(spec), name=spec.name)
        if whole.name != "cache":  # The hub answers again: to fail is better than to bring all splits.
            raise
        return whole
    _refuse_foreign_files(builder, spec)
    return builder


def _refuse_foreign_files(builder: Any, spec: DatasetSpec) -> None:
    """Refuse a data set that takes its rows from files which are not its own: its README may name any, of any place."""
    is_local = user_path(str(spec.path)).is_dir()
    folders = [folder.resolve() for folder in _own_folders(spec)]
    place = f"hf://datasets/{builder.repo_id}@" if builder.repo_id else f"{builder.base_path}/"

    def is_own(file: str) -> bool:
        if "::" in file:  # a::b is the member a of the archive b, wherever that lies.
            return False
        if not is_local:
            return file.startswith(place)
        return "://" not in file and any(map(Path(os.path.realpath(file)).is_relative_to, folders))

    files = [file for split in (builder.config.data_files or {}).values() for file in split]
    if foreign := [file for file in files if not is_own(file)]:
        raise DatasetError(
            f"The data set {spec.path} names data files that are not in it ({first_names(foreign)}); bring them into "
            "its folder, or take them out of its README.md."
        )


def _restrict(builder: Any, spec: DatasetSpec) -> bool:
    """Make a builder prepare the wanted split alone, and say whether that can be done.

    Left to itself it downloads and prepares every split: 150 GB for the 50,000 validation images of ImageNet-1K. Only
    files of parquet stand for themselves; a folder of images, for one, has its classes from all splits.
    """
    cache, prepared = _split_cache(spec), Path(builder.cache_dir)
    if cache is None or not prepared.is_relative_to(cache):
        return False
    if prepared.exists():
        return True
    split, files = cache.name, builder.config.data_files or {}
    whole = _cache() / prepared.relative_to(cache)
    if builder.name != "parquet" or split not in files or len(files) == 1 or whole.exists():
        return False
    if builder.info.features is None:
        builder.as_streaming_dataset(split)  # This takes the columns from the first file of all splits, as ever.
    builder.config.data_files = {split: files[split]}
    for other in set(builder.info.splits or ()) - {split}:  # Else they would be missed.
        del builder.info.splits[other]
    builder.info.size_in_bytes = None  # Room for all of it is not needed.
    return True


def _split_cache(spec: DatasetSpec) -> Path | None:
    """Return the cache of a split that is prepared alone; None for a sum of splits.

    In that of the whole, ``datasets`` would take the one for the other where it cannot reach the hub.
    """
    split = re.fullmatch(r"(\w+(?:\.\w+)*)(?:\[[^+]*\])?", spec.split)
    return None if split is None or split[1] == "all" else _cache() / "one-split" / split[1]


def _cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE).expanduser()


def _location(spec: DatasetSpec) -> str:
    folder = user_path(str(spec.path))
    if folder.is_file():
        raise DatasetError(f"{folder} is a file, and source hub takes folders; set dataset.path to {folder.parent}.")
    if (folder / "state.json").is_file():  # As datasets tells them, when it is late.
        raise DatasetError(
            f"{folder} was written by save_to_disk; load it by load_from_disk, and write it by to_parquet."
        )
    return str(folder) if folder.is_dir() else str(spec.path)


def cannot_load(spec: DatasetSpec, error: Exception) -> DatasetError:
    """Returns the error for what ``datasets`` raised."""
    return DatasetError(
        f"Cannot load split '{spec.split}' of the data set {spec.path} ({first_line(error)}); check dataset.path, "
        "name and split, and the network."
    )


def _undecoded(table: Any, column: str, description: str) -> Any:
    """Return the column alone, its images as encoded bytes."""
    import datasets

    if column not in table.column_names:
        raise DatasetError(
            f"Column '{column}' is not in {description}, which has {', '.join(table.column_names)}; "
            "set dataset.image_column."
        )
    try:
        return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # Arrow and datasets each have their own families of errors.
        raise DatasetError(
            f"Column '{column}' of {description} holds no images ({first_line(error)}); set dataset.image_column."
        ) from error


def _listing(images: Any, spec: DatasetSpec) -> str | None:
    """Digest of the table's files; None when images lie outside of them, or there are none.

    The fingerprint that ``datasets`` has differs between machines, and stays when a file it refers to changes.
    """
    paths = [Path(file["filename"]) for file in images.cache_files]
    if not paths or any(map(_refers_to_files, images.data.column(spec.image_column).chunks)):
        return None
    return stat_listing(((str(path), path.stat()) for path in paths), spec.split, spec.image_column, str(len(images)))


def _refers_to_files(chunk: Any) -> bool:
    """Whether an Arrow array of images has some that are only named."""
    without_bytes = chunk.field("bytes").is_null().to_numpy(zero_copy_only=False)
    return bool((without_bytes & chunk.field("path").is_valid().to_numpy(zero_copy_only=False)).any())
