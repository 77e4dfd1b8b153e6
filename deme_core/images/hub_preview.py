"""A look at a data set of `HubSource` before it is fetched or read."""

from collections.abc import Iterable
from typing import Any

from deme_core.errors import DatasetError
from deme_core.images.hub import HubSource, cannot_load, open_builder
from deme_core.local_files import user_path
from deme_core.recipe import DatasetSpec

# Enough to tell what columns hold.
_NUM_FIRST_ROWS = 8


def count_rows(spec: DatasetSpec) -> int | None:
    """Return the number of rows of a split without fetching it; None where its description does not say.

    Raises:
        DatasetError: the data set cannot be reached, or is known not to have the split or one of the columns.
    """
    try:
        info = open_builder(spec).info
    except DatasetError:
        raise
    except Exception as error:  # Builders, file systems and HTTP clients each raise their own.
        raise cannot_load(spec, error) from error
    num_rows = _count(info.splits, spec) if info.splits else None
    wanted = [spec.image_column, *filter(None, [spec.caption_column, spec.label_column])]
    if info.features and (absent := [name for name in wanted if name not in info.features]):
        raise DatasetError(
            f"Column '{absent[0]}' is not in the data set {spec.path}, which has {', '.join(info.features)}; check "
            "dataset.image_column, caption_column and label_column."
        )
    return num_rows


def first_rows(spec: DatasetSpec) -> HubSource | None:
    """Return the first rows of a local folder, of which the rest is not read; None of a slice, or one of the hub.

    Raises:
        DatasetError: it cannot be loaded, or has no such split, or no images in such a column.
    """
    import datasets

    if not user_path(str(spec.path)).is_dir():
        return None
    try:
        builder = open_builder(spec)
        splits = list(map(str, builder.config.data_files or {}))
        wanted = splits[:1] if spec.split == "all" else [name.partition("[")[0] for name in spec.split.split("+")]
        if splits and not set(wanted) <= set(splits):
            raise _no_split(spec, splits)
        if "[" in spec.split:  # Its rows may be none of the first.
            return None
        stream = builder.as_streaming_dataset(wanted[0])
        stream = stream.decode(False) if stream.features else stream
        rows = list(stream.take(_NUM_FIRST_ROWS))
        columns = {name: [row.get(name) for row in rows] for name in stream.features or (rows[0] if rows else ())}
        table = datasets.Dataset.from_dict(columns, features=stream.features)
    except DatasetError:
        raise
    except Exception as error:  # As above.
        raise cannot_load(spec, error) from error
    return HubSource(spec, table)


def _no_split(spec: DatasetSpec, splits: Iterable[str]) -> DatasetError:
    return DatasetError(
        f"The data set {spec.path} has the splits {', '.join(splits)}, and no '{spec.split}'; set dataset.split."
    )


def _count(splits: Any, spec: DatasetSpec) -> int:
    """Returns the number of rows of a split, of a slice of one or of a sum of such, as ``datasets`` reads them."""
    import datasets

    lengths = {name: split.num_examples for name, split in splits.items()}
    try:
        split = datasets.Split("+".join(lengths) if spec.split == "all" else spec.split)  # Which allows no spaces.
        asked = datasets.ReadInstruction.from_spec(split)
        return sum(max(part.to - part.from_, 0) for part in asked.to_absolute(lengths))
    except ValueError as error:
        raise _no_split(spec, lengths) from error
