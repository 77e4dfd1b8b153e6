"""Prompts: the texts that images are generated from or scored against, one for each image in turn."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from deme_core.digests import json_digest
from deme_core.downloads import download_once, listing_version
from deme_core.errors import InputError, PromptsError, StoreUnavailableError
from deme_core.imagenet_classes import imagenet_names
from deme_core.local_files import user_path
from deme_core.store import folder_and_key, open_store

# Columns, or keys, that may hold the prompts, in lower case: PartiPrompts has Prompt, MS-COCO caption.
_PROMPT_COLUMNS = ("prompt", "caption")
_LINE_KEYS = ("text", *_PROMPT_COLUMNS)
_MEND = (
    "set evaluate.prompts to a text file with one prompt per line, a .tsv or .csv file with a header, a .json file "
    "with a list of texts or COCO's captions (annotations with id and caption), or a .jsonl file with one object in "
    "each line that has either text, caption or prompt"
)
# Not files: prompts made of the names of classes.
IMAGENET_1K, CIFAR_10 = "imagenet1k", "cifar10"
_CIFAR_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Prompts:
    """A list of prompts; image i of a set belongs to prompt i modulo their number.

    Attributes:
        texts: the prompts, in the order of the file.
        columns: what else a table says of each prompt, by the table's own header.
        digest: SHA-256 over texts and columns.
    """

    texts: tuple[str, ...]
    columns: dict[str, tuple[str, ...]]
    digest: str

    def of_images(self, indices: Sequence[int]) -> list[str]:
        """Returns the prompt of each of these images of a set."""
        return [self.texts[index % len(self.texts)] for index in indices]


def load_prompts(path_or_uri: str, cache: Path) -> Prompts:
    """Reads prompts from a text file, one per line, or from the column Prompt or caption of a table with a header.

    Args:
        path_or_uri: path or object-store URI. ``.tsv`` and ``.csv`` files are tables; a quotation mark in a TSV stands
            for itself, as PartiPrompts has it. ``.json`` is a list of texts or COCO's captions, in the order of the
            annotations' ids; ``.jsonl`` has ``text``, ``caption`` or ``prompt`` in each line. All others are plain
            text, of which empty lines are left out. Or ``imagenet1k`` or ``cifar10``, for "a photo of a …" with each of
            ImageNet's 1,000 classes, or of CIFAR-10's ten, in their usual order.
        cache: what a URI names is fetched into this folder, once for each version of it.

    Returns:
        The prompts, at least one.

    Raises:
        PromptsError: there is no such file, it is no UTF-8 text, its table or JSON is none of these or damaged, or it
            holds no prompts.
    """
    if path_or_uri == IMAGENET_1K:
        return _prompts(tuple(f"a photo of a {name}" for name in imagenet_names()), {})
    if path_or_uri == CIFAR_10:
        return _prompts(tuple(f"a photo of a {name}" for name in _CIFAR_10), {})
    path = _fetched(path_or_uri, cache) if "://" in path_or_uri else user_path(path_or_uri)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PromptsError(f"The prompts {path_or_uri} cannot be read ({error.strerror}); {_MEND}.") from error
    except UnicodeDecodeError as error:
        raise PromptsError(f"The prompts {path_or_uri} are no UTF-8 text; {_MEND}.") from error
    if path.suffix.lower() in (".tsv", ".csv"):
        texts, columns = _read_table(text, path_or_uri, is_tsv=path.suffix.lower() == ".tsv")
    elif path.suffix.lower() in (".json", ".jsonl"):
        texts, columns = _read_json(text, path_or_uri, is_lines=path.suffix.lower() == ".jsonl"), {}
    else:
        texts, columns = tuple(line.strip() for line in text.split("\n") if line.strip()), {}
    if not texts:
        raise PromptsError(f"There are no prompts in {path_or_uri}; {_MEND}.")
    return _prompts(texts, columns)


def _prompts(texts: tuple[str, ...], columns: dict[str, tuple[str, ...]]) -> Prompts:
    return Prompts(texts, columns, json_digest([texts, columns]))


def _read_json(text: str, where: str, *, is_lines: bool) -> tuple[str, ...]:
    """Returns the prompts of a ``.json`` or ``.jsonl`` file, their white space made single spaces."""
    try:
        # Not splitlines, which cuts at characters that a text may hold.
        rows = [json.loads(line) for line in text.split("\n") if line.strip()] if is_lines else json.loads(text)
        found = [_only_text(row) for row in rows] if is_lines else _listed(rows)
        prompts = tuple(" ".join(prompt.split()) for prompt in found)
        "".join(prompts).encode()  # Half a character, which JSON allows and no tokenizer takes, is a ValueError.
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise PromptsError(f"{where} is JSON of a form that holds no prompts; {_MEND}.") from error
    if not all(prompts):
        raise PromptsError(f"Prompt {prompts.index('') + 1} of {where} is empty; write or remove it.")
    return prompts


def _only_text(row: Any) -> str:
    (text,) = [value for key, value in row.items() if key.strip().lower() in _LINE_KEYS]
    return text


def _listed(content: Any) -> list[str]:
    if isinstance(content, list):
        return content
    return [row["caption"] for row in sorted(content["annotations"], key=lambda row: row["id"])]


def _read_table(text: str, where: str, *, is_tsv: bool) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Returns the prompts, and the other columns by name."""
    header, *body = _rows(text, where, is_tsv=is_tsv) or [[]]
    chosen = [index for index, name in enumerate(header) if name.strip().lower() in _PROMPT_COLUMNS]
    if len(chosen) != 1 or len(set(header)) != len(header):
        raise PromptsError(
            f"The header of {where} must name its columns once each, and one of them Prompt or caption, unlike "
            f"{', '.join(header)!r}."
        )
    for number, row in enumerate(body, start=1):
        if len(row) != len(header):
            raise PromptsError(f"Prompt {number} of {where} has {len(row)} fields for {len(header)} columns; mend it.")
        if not row[chosen[0]].strip():
            raise PromptsError(f"Prompt {number} of {where} is empty; write or remove it.")
    columns = {name: tuple(row[index] for row in body) for index, name in enumerate(header)}
    return tuple(prompt.strip() for prompt in columns.pop(header[chosen[0]])), columns


def _rows(text: str, where: str, *, is_tsv: bool) -> list[list[str]]:
    """Returns the rows of a table that are not empty."""
    lines = StringIO(text, newline="")
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(lines, strict=True)
    try:
        return [row for row in reader if row]
    except csv.Error as error:
        raise PromptsError(f"{where} is no CSV file ({error}); mend its quotation marks.") from error


def _fetched(uri: str, cache: Path) -> Path:
    folder, key = folder_and_key(uri)
    try:
        store = open_store(folder)
    except StoreUnavailableError:  # It may pass, and is tried again.
        raise
    except InputError as error:
        # Not repeated: it may hold a password.
        raise PromptsError("Prompts cannot be had from such an address; give s3://BUCKET/KEY or a path.") from error
    objects = [item for item in store.list(key) if item.key == key]
    if not objects:
        raise PromptsError(f"There are no prompts at {uri}; {_MEND}.")
    return download_once(store, objects, cache / "prompts" / listing_version(uri, objects)) / key
