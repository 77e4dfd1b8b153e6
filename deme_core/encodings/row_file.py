"""One tensor in one safetensors file, written and read by rows, so that neither ever needs all of it in memory."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from safetensors import safe_open

from deme_core.checkpoint import TensorInfo, write_header, write_tensor

_NAME = "rows"


class RowWriter:
    """Writes a tensor of ``num_rows`` rows, some rows at a time, as a context manager.

    Args:
        path: the file.
        num_rows: rows in all.
        dtype: what floating-point rows are cast to; others keep their own.
    """

    def __init__(self, path: Path, num_rows: int, dtype: torch.dtype = torch.float32) -> None:
        self._path, self._num_rows, self._dtype = path, num_rows, dtype
        self._file: BinaryIO | None = None
        self._info: TensorInfo | None = None
        self._written = 0

    def append(self, rows: torch.Tensor) -> None:
        """Writes rows (n, ...); a ValueError if they differ in shape or type from those before."""
        rows = rows.detach().to("cpu", self._dtype if rows.is_floating_point() else rows.dtype)
        info = TensorInfo((self._num_rows, *rows.shape[1:]), rows.dtype)
        if self._file is None:
            self._file, self._info = self._path.open("wb"), info
            write_header(self._file, {_NAME: info})
        if info != self._info:
            raise ValueError(f"rows like {info} do not belong to {self._info} in {self._path}")
        write_tensor(self._file, rows)
        self._written += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        assert kind is not None or self._written == self._num_rows, (self._path, self._written, self._num_rows)


class Rows:
    """The rows of several files one after another, memory-mapped.

    Args:
        paths: the files, in order.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        # Tensors of safetensors on a CPU are views of the mapped file.
        self._pieces = [safe_open(path, framework="pt").get_tensor(_NAME) for path in paths]
        self._ends = torch.tensor([len(piece) for piece in self._pieces]).cumsum(0)

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._ends[-1])

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns the rows int64 (B,), in memory: floating-point ones as float32."""
        pieces = torch.bucketize(indices, self._ends, right=True).tolist()
        rows = torch.stack(
            [
                self._pieces[piece][index - int(self._ends[piece])]  # Counted from the end of its piece.
                for piece, index in zip(pieces, indices.tolist(), strict=True)
            ]
        )
        return rows.float() if rows.is_floating_point() else rows
