"""Captions and labels: the columns of a source as what a model is conditioned on."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from deme_core.errors import DatasetError
from deme_core.imagenet_classes import are_imagenet_ids, imagenet_names, imagenet_numbers
from deme_core.images.source import LABEL, Column, ImageSource, first_names
from deme_core.recipe import DatasetSpec

_LARGEST_LABEL = 2**63 - 1  # Batches have them as int64.


@dataclass(frozen=True)
class Conditioning:
    """What the images of a data set are conditioned on, in their order; None where nothing was asked for.

    Attributes:
        captions: a text for each image.
        labels: a class for each image, from 0.
        class_names: the classes by number, where names were given and sorted to number them.
    """

    captions: Sequence[str] | None = None
    labels: Sequence[int] | None = None
    class_names: Sequence[str] | None = None


def read_conditioning(source: ImageSource, spec: DatasetSpec, indices: Sequence[int]) -> Conditioning:
    """Read the captions and labels that a recipe asks for.

    Args:
        source: the images and their columns.
        spec: names the columns, or gives a template of the captions.
        indices: positions in the source of the images that are used.

    Raises:
        DatasetError: a column is missing or of the wrong kind, or some images have no caption or label.
    """
    captions = None
    if spec.caption_column is not None:
        captions = _captions(source, spec, indices)
    elif spec.caption_template is not None:
        captions = _from_template(source, spec, indices)
    _refuse_half_characters(source, indices, captions or ())
    if spec.label_column is None:
        return Conditioning(captions)
    column = _column(source, spec.label_column, "label_column", spec)
    labels, class_names = _labels(column, source, spec.label_column)
    used = [labels[index] for index in indices]
    _refuse_missing(source, indices, used, f"label in column '{spec.label_column}'")
    return Conditioning(captions, [label for label in used if label is not None], class_names)


def _captions(source: ImageSource, spec: DatasetSpec, indices: Sequence[int]) -> list[str]:
    name = str(spec.caption_column)
    column = _column(source, name, "caption_column", spec)
    values = [_named(column, index) for index in indices]
    for value in values:
        if not isinstance(value, str | None):
            raise DatasetError(
                f"Column '{name}' of {source.description} holds values such as {value!r:.60}, not texts; "
                "set dataset.caption_column."
            )
    texts = [value.strip() if value else "" for value in values]
    _refuse_missing(source, indices, [text or None for text in texts], f"caption in column '{name}'")
    return texts


def _from_template(source: ImageSource, spec: DatasetSpec, indices: Sequence[int]) -> list[str]:
    pieces = [(text, name) for text, name, _, _ in Formatter().parse(str(spec.caption_template))]
    names = sorted({name for _, name in pieces if name is not None})
    columns = {name: _column(source, name, "caption_template", spec) for name in names}
    values = {name: [_named(column, index) for index in indices] for name, column in columns.items()}
    for name in names:
        _refuse_missing(source, indices, values[name], f"value in column '{name}', which dataset.caption_template uses")
    return [
        "".join(text if name is None else f"{text}{values[name][row]}" for text, name in pieces)
        for row in range(len(indices))
    ]


def _column(source: ImageSource, name: str, key: str, spec: DatasetSpec) -> Column:
    column = source.column(name)
    if column is None:
        has = ", ".join(source.columns) or "none"
        hint = ""
        if spec.source == "imagefolder" and list(source.columns) == [LABEL]:
            hint = (
                ", or write metadata.jsonl into the folder, with file_name and that column in each line (.txt and .csv "
                "files are not read; metadata.csv is by dataset.source: hub)"
            )
        raise DatasetError(f"Column '{name}' is not in {source.description}, which has {has}; set dataset.{key}{hint}.")
    return _as_imagenet(column)


def _as_imagenet(column: Column) -> Column:
    """Name and number classes as ImageNet-1k does where all of their names are its WordNet ids.

    In the order of a few folders they would have others' numbers, and no text encoder knows n01440764.
    """
    values, known = column.values, column.class_names
    names = values if known is None else known
    first = next((name for name in names if name is not None), None)
    if not isinstance(first, str) or not are_imagenet_ids([first]):  # As of millions of captions.
        return column
    if not all(isinstance(name, str | None) for name in names):
        return column
    if not are_imagenet_ids({name for name in names if name is not None}):
        return column
    if known is not None:
        values = [None if value is None or not 0 <= value < len(known) else known[value] for value in values]
    numbers = imagenet_numbers()
    return Column([None if value is None else numbers[value] for value in values], imagenet_names())


def _named(column: Column, index: int) -> Any:
    """The value of one image: the name of its class where classes have names, None where there is none."""
    value = column.values[index]
    if column.class_names is None or value is None:
        return value
    return column.class_names[value] if 0 <= value < len(column.class_names) else None


def _labels(column: Column, source: ImageSource, name: str) -> tuple[list[int | None], Sequence[str] | None]:
    """Return the class of every image of the source, so that a part of it has the same classes, and sorted names."""
    present = [value for value in column.values if value is not None]
    if all(isinstance(value, int) for value in present):
        if (largest := max(present, default=0)) > _LARGEST_LABEL:
            raise DatasetError(
                f"Column '{name}' of {source.description} holds numbers such as {largest!r:.60}, too large for a "
                "class; set dataset.label_column."
            )
        numbers = [int(value) if value is not None and value >= 0 else None for value in column.values]
        names = column.class_names
        return numbers, names if names and list(names) == sorted(names) else None
    if all(isinstance(value, str) for value in present):
        names = sorted(set(present))
        number_of = {name: number for number, name in enumerate(names)}
        return [None if value is None else number_of[value] for value in column.values], names
    wrong = next((value for value in present if not isinstance(value, int | str)), None)
    such = f"values such as {wrong!r:.60}, neither classes nor their names"
    held = "both classes and names" if wrong is None else such
    raise DatasetError(f"Column '{name}' of {source.description} holds {held}; set dataset.label_column.")


def _refuse_half_characters(source: ImageSource, indices: Sequence[int], captions: Sequence[str]) -> None:
    """Refuse what JSON allows and no tokenizer takes: one half of a character that UTF-16 writes in two."""
    halves = [index for index, text in zip(indices, captions, strict=False) if _is_half(text)]
    if halves:
        raise DatasetError(
            f"{len(halves)} of {len(indices)} captions in {source.description} hold half of a character, such as a cut "
            f"emoji ({first_names([source.name(index) for index in halves])}); mend them, or leave these images out."
        )


def _is_half(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _refuse_missing(source: ImageSource, indices: Sequence[int], values: Sequence[Any], what: str) -> None:
    missing = [index for index, value in zip(indices, values, strict=True) if value is None]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(indices)} images in {source.description} have no {what} "
            f"({first_names([source.name(index) for index in missing])}); give each one, or leave these images out."
        )
