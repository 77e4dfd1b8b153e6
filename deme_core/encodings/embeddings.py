"""Embeddings of a data set's captions: each distinct text once, the empty one of caption dropout among them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from deme_core.encodings.row_file import Rows, RowWriter
from deme_core.families import Adapter, ConditioningTensors
from deme_core.slices import ENCODED_AT_ONCE


def distinct_captions(captions: Sequence[str]) -> list[str]:
    """Returns each text once, sorted; the empty one is always there, and first."""
    return sorted({"", *captions})


def write_embeddings(
    folder: Path, texts: Sequence[str], adapter: Adapter, *, dtype: torch.dtype = torch.float32
) -> Iterator[int]:
    """Writes what texts become: a file for each tensor that conditions the denoiser.

    Args:
        folder: where to.
        texts: a slice of the distinct captions.
        adapter: has the text encoders.
        dtype: how floating-point tensors are stored.

    Yields:
        How many texts are done.
    """
    writers: dict[str, RowWriter] = {}
    with ExitStack() as stack:
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            some = texts[start : start + ENCODED_AT_ONCE]
            for name, rows in adapter.encode_prompts(some).items():
                if name not in writers:
                    writer = RowWriter(folder / f"{name}.safetensors", len(texts), dtype)
                    writers[name] = stack.enter_context(writer)
                writers[name].append(rows)
            yield start + len(some)


class Embeddings:
    """What `write_embeddings` wrote of all slices of the distinct captions.

    Args:
        folders: of the slices, in order.
        texts: the distinct captions.
    """

    def __init__(self, folders: Sequence[Path], texts: Sequence[str]) -> None:
        names = sorted(path.name for path in folders[0].glob("*.safetensors"))
        self._rows = {Path(name).stem: Rows([folder / name for folder in folders]) for name in names}
        self._positions = {text: position for position, text in enumerate(texts)}

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._positions)

    def gather(self, captions: Sequence[str]) -> ConditioningTensors:
        """Returns the tensors, each (B, ...), of B captions."""
        positions = torch.tensor([self._positions[caption] for caption in captions])
        return {name: rows[positions] for name, rows in self._rows.items()}
