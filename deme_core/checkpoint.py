"""Checkpoint: named tensors in safetensors files, read and written one tensor at a time."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from deme_core.errors import IncompatibleCheckpointsError, ModelFolderError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# As much as cp writes at once: larger writes make the kernel look for huge pages, which a virtual machine may have
# to ask its host for, at several times the cost of the write.
_BYTES_PER_WRITE = 1 << 18


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_infos(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """Returns shape and dtype of each tensor, in their order."""
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


class Checkpoint:
    """The tensors of one or several safetensors files, memory-mapped.

    Args:
        files: the files; a tensor name may occur in one of them only.
        rename: what a tensor is called, from its name in the file.

    Raises:
        ModelFolderError: a file is truncated, is not safetensors, or repeats a tensor of another.
    """

    def __init__(self, *files: Path, rename: Callable[[str], str] = lambda name: name) -> None:
        self.files = files
        self._places: dict[str, tuple[Any, str]] = {}
        for file in files:
            handle = _open(file)
            stored_names = list(handle.keys())
            places = {rename(stored): (handle, stored) for stored in stored_names}
            if len(places) < len(stored_names):
                raise ModelFolderError(f"{file} has a tensor twice, by its old name and by today's.")
            if repeated := places.keys() & self._places.keys():
                raise ModelFolderError(f"{file} repeats tensors of another file: {', '.join(sorted(repeated))}.")
            self._places.update(places)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._places))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> torch.Tensor:
        """Returns the tensor, backed by the file until it is written to.

        Raises:
            ModelFolderError: it is of a type that cannot be read.
        """
        handle, stored = self._places[name]
        try:
            tensor: torch.Tensor = handle.get_tensor(stored)
            return tensor
        except SafetensorError as error:
            kind = handle.get_slice(stored).get_dtype()
            raise ModelFolderError(f"Tensor {name} is of type {kind}, which DeMe cannot read ({error}).") from error

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor, read from the headers alone."""
        infos = {}
        for name in self:
            handle, stored = self._places[name]
            piece = handle.get_slice(stored)
            if (dtype := _DTYPES.get(piece.get_dtype())) is None:
                raise ModelFolderError(f"Tensor {name} is of type {piece.get_dtype()}, which DeMe does not merge.")
            infos[name] = TensorInfo(tuple(piece.get_shape()), dtype)
        return infos

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all tensors."""
        return {name: self[name] for name in self}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{file} is not a whole safetensors file ({error}); fetch it again.") from error


def check_same_tensors(
    name: str, actual: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo], *, reference: str
) -> None:
    """Raises IncompatibleCheckpointsError, listing every difference in names and shapes."""
    mismatched = [
        f"{key} {actual[key].shape} for {expected[key].shape}"
        for key in sorted(actual.keys() & expected.keys())
        if actual[key].shape != expected[key].shape
    ]
    missing, extra = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    if missing or extra or mismatched:
        raise IncompatibleCheckpointsError(
            name, reference=reference, missing=missing, extra=extra, mismatched=mismatched
        )


def write_tensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a safetensors file while holding one tensor at a time.

    safetensors' own ``save_file`` wants every tensor at once. The file appears under its name when it is whole.

    Args:
        path: the file to write.
        infos: shape and dtype of every tensor, in the order in which ``tensors`` yields them.
        tensors: names and values; values are cast to the announced dtype.
        metadata: texts for the file's header.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write_header(file, infos, metadata)
            for (name, tensor), (expected, info) in zip(tensors, infos.items(), strict=True):
                assert name == expected, (name, expected)
                assert tensor.shape == info.shape, (name, tensor.shape, info.shape)
                write_tensor(file, tensor.to("cpu", info.dtype))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_header(
    file: BinaryIO, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes the beginning of a safetensors file, whose tensors follow in the order of ``infos``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, info in infos.items():
        end = offset + info.num_bytes
        header[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)


def write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    """Writes the values of a tensor on the CPU."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), _BYTES_PER_WRITE):
        file.write(data[start : start + _BYTES_PER_WRITE])


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes ``tensors`` as a safetensors file, sorted by name; see `write_tensors`."""
    in_order = {name: tensors[name].detach() for name in sorted(tensors)}
    write_tensors(path, tensor_infos(in_order), in_order.items(), metadata)
