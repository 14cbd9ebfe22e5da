"""The register file of a block: a row of all lanes for every register, and operands as views of rows."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ptx.fault import Fault
from ptx.numbers import SIZE, UNSIGNED, Array
from slideredit_rt.kernels.ptx import Kernel

AXES = "xyz"


class Registers:
    """Registers, special registers and parameters of a kernel.

    Args:
        kernel: Kernel whose declarations are followed.
        shared_base: Address of its shared memory.
    """

    def __init__(self, kernel: Kernel, shared_base: int) -> None:
        self.threads, self._symbols = kernel.threads, {}
        self._rows = {
            name: np.zeros(self.threads, bool if kind == "pred" else UNSIGNED[SIZE[kind]])
            for name, kind in kernel.registers.items()
        }
        self._special = {f"%{name}.{axis}": self._row(0) for name in ("tid", "ntid", "ctaid", "nctaid") for axis in AXES}
        self._special |= {"%laneid": np.arange(self.threads, dtype=np.uint32) % 32}
        self._special["%tid.x"][:] = np.arange(self.threads)
        self._special["%ntid.x"][:] = self.threads
        end = 0
        for name, kind in kernel.parameters.items():
            start = -(-end // SIZE[kind]) * SIZE[kind]
            self._symbols[name], end = start, start + SIZE[kind]
        if kernel.shared is not None:
            self._symbols[kernel.shared] = shared_base
        self.parameters = np.zeros(-(-end // 16) * 16, np.uint8)

    def _row(self, value: int) -> Array:
        return np.full(self.threads, value, np.uint32)

    def reset(self, block: tuple[int, int], grid: tuple[int, int]) -> None:
        """Start a block. Registers that nothing has written hold all bits set: NaN in every float."""
        for row in self._rows.values():
            row[...] = True if row.dtype == bool else np.array(-1).astype(row.dtype)
        for axis, place, count in zip(AXES, block, grid, strict=False):
            self._special[f"%ctaid.{axis}"][:], self._special[f"%nctaid.{axis}"][:] = place, count

    def set_parameter(self, name: str, kind: str, value: int) -> None:
        raw = value.to_bytes(SIZE[kind], "little", signed=value < 0)
        start = self._symbols[name]
        self.parameters[start : start + SIZE[kind]] = np.frombuffer(raw, np.uint8)

    def source(self, text: str, dtype: type) -> Array:
        """Return a register as a view, in which later writes show, or a row of a constant."""
        size = np.dtype(dtype).itemsize
        row = self._rows.get(text, self._special.get(text))
        if row is not None:
            if row.dtype == bool or row.itemsize != size:
                raise Fault(f"{text} is {row.dtype}, but the instruction takes {np.dtype(dtype)}")
            return row.view(dtype)
        if text in self._symbols:
            return np.full(self.threads, self._symbols[text], UNSIGNED[size]).view(dtype)
        return self._immediate(text, dtype)

    def target(self, text: str, dtype: type) -> Array:
        if text not in self._rows:
            raise Fault(f"{text} cannot be written")
        return self.source(text, dtype)

    def predicate(self, text: str) -> Array:
        row = self._rows.get(text)
        if row is None or row.dtype != bool:
            raise Fault(f"{text} is not a predicate")
        return row

    def any_width(self, text: str) -> Array:
        """Return a register of any width, unsigned."""
        if text not in self._rows or self._rows[text].dtype == bool:
            raise Fault(f"{text} is not a register of numbers")
        return self._rows[text]

    def known(self, text: str) -> bool:
        return text in self._rows

    def address(self, text: str) -> Callable[[], Array]:
        """Return a function that returns the int64 addresses of an operand such as `[%rd3 + 16]`."""
        match = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if match is None:
            raise Fault(f"cannot read the address {text!r}")
        offset = int(match[2], 0) if match[2] else 0
        if match[1] in self._rows:
            row = self._rows[match[1]]
            signed = row.view(np.int64 if row.itemsize == 8 else np.int32)
            return lambda: signed.astype(np.int64) + offset
        if match[1] not in self._symbols:
            raise Fault(f"unknown symbol in {text!r}")
        fixed = np.full(self.threads, self._symbols[match[1]] + offset, np.int64)
        return lambda: fixed

    def _immediate(self, text: str, dtype: type) -> Array:
        # ISA: Lexical Elements, Constants. 0f and 0d are the bits of a float.
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return self._row(int(match[1], 16)).view(dtype)
        size = np.dtype(dtype).itemsize
        if np.issubdtype(dtype, np.floating) or re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text) is None:
            raise Fault(f"{text!r} is not a constant of {np.dtype(dtype)}")
        return np.full(self.threads, int(text.rstrip("U"), 0) & ((1 << 8 * size) - 1), UNSIGNED[size]).view(dtype)
