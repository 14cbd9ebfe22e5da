"""Safetensors files by their headers: where each tensor lies, reading one at a time, and writing one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import atomic_file

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the safetensors library's own limit, in bytes
LFS_POINTER = b"version https://git-lfs"
LFS_HINT = "it is a Git LFS pointer and not the file itself: run git lfs pull"


@dataclass(frozen=True)
class Stored:
    """Location of a tensor on disk: `length` bytes at `offset` in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    length: int


def read_header(path: Path) -> tuple[dict[str, Stored], bytes]:
    """Read the header of a safetensors file.

    Returns:
        The tensors by name, in the order of their data, and the raw header including its 8-byte length prefix.

    Raises:
        SliderEditError: The file is missing or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix and LFS_POINTER.startswith(prefix):
                raise ValueError(LFS_HINT)
            if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"the header does not fit into its {size} bytes")
            raw = file.read(length)
        start = 8 + length
        entries = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        places = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (first, last, *entry["shape"])):
                raise ValueError(f"{name} has a shape or a place that is not made of whole numbers")
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
            place = Stored(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start + first, last - first)
            if first < 0 or start + last > size or place.length != math.prod(place.shape) * place.dtype.itemsize:
                raise ValueError(f"{name} is incomplete")
            places[name] = place
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SliderEditError(f"cannot read the weights in {str(path)!r} ({error}); download or build them again") from error
    return places, prefix + raw


def take_rows(place: Stored, first: int, last: int) -> Stored:
    """Return the location of some rows of a tensor, which lie together.

    Args:
        place: Location of the tensor, `[N, ...]`.
        first: First row.
        last: Row after the last one.

    Raises:
        ValueError: The tensor has no such rows.
    """
    if not place.shape or not 0 <= first < last <= place.shape[0]:
        raise ValueError(f"a tensor of shape {list(place.shape)} has no rows {first} to {last}")
    row = place.length // place.shape[0]
    return Stored(place.file, place.dtype, (last - first, *place.shape[1:]), place.offset + first * row, (last - first) * row)


def read_tensor(place: Stored) -> Tensor:
    """Read one tensor. Mapping it instead would count its pages as memory of this process."""
    with place.file.open("rb") as file:
        file.seek(place.offset)
        data = bytearray(file.read(place.length))
    return (
        torch.frombuffer(data, dtype=place.dtype).reshape(place.shape) if data else torch.empty(place.shape, dtype=place.dtype)
    )


def make_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Make a header, with its length prefix, for tensors that follow in this order.

    Args:
        tensors: Dtype and shape of each tensor, by name.
        metadata: Text to store beside them.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # keeps the data aligned
    return len(raw).to_bytes(8, "little") + raw


def write_tensors(path: Path, header: bytes, tensors: Iterable[Tensor]) -> None:
    """Write a file tensor by tensor: `safetensors.torch.save_file` needs all at once and reorders them.

    Args:
        path: File to write, atomically.
        header: Header from `make_header`.
        tensors: Tensors of the dtypes and shapes in the header, in its order.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            # The view keeps a scalar's bytes, too.
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
