"""Global memory: buffers with bounds, alignment and a count of the writes to every byte."""

from __future__ import annotations

import numpy as np

from ptx.fault import Fault
from ptx.numbers import UNSIGNED, Array

ALIGNMENT = 16
"""Alignment of a buffer, in bytes: what the kernels are compiled for, and not more."""


class Buffer:
    """A device allocation whose addresses cross a 4 GiB boundary, so that 32-bit arithmetic on them shows.

    Attributes:
        name: Name in messages.
        size: Number of bytes.
        address: First address.
        written: Number of writes to each byte.
        read: Whether each byte was read.
    """

    def __init__(self, place: int, array: Array, name: str) -> None:
        raw = np.ascontiguousarray(array).view(np.uint8).ravel()
        self.name, self.size = name, raw.size
        self.address = ((0x7F10 + 2 * place) << 32) - 0x110
        # Longer than the buffer, so that it can be viewed in elements of any size.
        self._bytes = np.full(-(-raw.size // ALIGNMENT) * ALIGNMENT, 0xFF, np.uint8)
        self._bytes[: raw.size] = raw
        self._written = np.zeros(self._bytes.size, np.uint8)
        self._read = np.zeros(self._bytes.size, bool)

    @property
    def written(self) -> Array:
        return self._written[: self.size]

    @property
    def read(self) -> Array:
        return self._read[: self.size]

    def array(self, dtype: type, shape: tuple[int, ...]) -> Array:
        """Return the content."""
        return self._bytes[: self.size].view(dtype).reshape(shape)

    def load(self, element: Array, width: int, count: int) -> Array:
        """Return `[lanes, count]` unsigned integers of `width` bytes; `element` counts in vectors of them."""
        size = width * count
        self._read.reshape(-1, size)[element] = True
        data: Array = self._bytes.view(UNSIGNED[width]).reshape(-1, count)[element]
        return data

    def store(self, element: Array, data: Array) -> None:
        """Write `[lanes, count]` unsigned integers; `element` counts in vectors of them."""
        size = data.itemsize * data.shape[1]
        check_same_places(element, data, self.name)
        self._bytes.view(data.dtype).reshape(-1, data.shape[1])[element] = data
        self._written.reshape(-1, size)[np.unique(element)] += 1


def check_same_places(element: Array, data: Array, where: str) -> None:
    """Lanes of one instruction may store to one place only if they store the same value: their order is undefined."""
    order = np.argsort(element, kind="stable")
    same = element[order][1:] == element[order][:-1]
    if same.any() and (data[order][1:] != data[order][:-1])[same].any():
        raise Fault(f"lanes write different values to one place of {where}")


class Global:
    """The buffers of a launch."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def find(self, address: Array, size: int) -> tuple[Buffer, Array]:
        """Return the buffer of an instruction's addresses and each lane's place, in elements of `size` bytes."""
        low, high = int(address.min()), int(address.max()) + size
        for buffer in self.buffers:
            if buffer.address <= low and high <= buffer.address + buffer.size:
                offset = address - buffer.address
                if (offset % size).any():
                    raise Fault(f"{size} bytes at {buffer.name} + {int(offset[offset % size != 0][0])} are misaligned")
                return buffer, offset // size
        raise Fault(self._out_of_bounds(address, size))

    def _out_of_bounds(self, address: Array, size: int) -> str:
        inside = np.zeros(address.shape, bool)
        for buffer in self.buffers:
            inside |= (address >= buffer.address) & (address + size <= buffer.address + buffer.size)
        if inside.all():
            return "lanes of one instruction access different buffers"
        bad = int(address[~inside][0])
        near = min(self.buffers, key=lambda b: min(abs(bad - b.address), abs(bad - b.address - b.size)))
        return f"{(~inside).sum()} lanes out of bounds: {size} bytes at {near.name} + {bad - near.address} of {near.size}"
