"""Integer and float arithmetic (ISA: Integer Arithmetic Instructions, Floating-Point Instructions)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.binding import Binding, Step, compute, opcode, put
from ptx.fault import Fault
from ptx.numbers import NUMPY, SIZE, WIDENED, Array, Mask

WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def elementwise(b: Binding, function: Any, kind: str) -> Step:
    """Return a step of a NumPy function whose operands and result have one type."""
    target, sources = b.target(NUMPY[kind]), b.sources(NUMPY[kind])
    if function.nin != len(sources):
        raise Fault(f"{len(sources)} operands where the instruction takes {function.nin}")

    def step(mask: Mask) -> None:
        function(*sources, out=target, where=True if mask is None else mask)

    return step


@opcode("add")
def add(b: Binding) -> Step:
    if b.modifiers[:2] == ("rn", "f32"):
        # ISA: Mixed Precision Floating-Point Instructions, add. The first operand is widened.
        widened = WIDENED[b.kind("rn", "f32")]
        short, wide = b.source(1, np.uint16), b.source(2, np.float32)
        return compute(b.target(np.float32), lambda: widened(short) + wide)
    if b.modifiers == ("f32x2",):
        x, y = (row.view(np.float32) for row in b.sources(np.uint64))
        return compute(b.target(np.uint64), lambda: (x + y).view(np.uint64))
    return elementwise(b, np.add, b.kind("rn"))


@opcode("sub")
def sub(b: Binding) -> Step:
    return elementwise(b, np.subtract, b.kind("rn"))


@opcode("min")
def minimum(b: Binding) -> Step:
    return elementwise(b, np.minimum, _integer(b))


@opcode("max")
def maximum(b: Binding) -> Step:
    return elementwise(b, np.maximum, _integer(b))


@opcode("neg")
def neg(b: Binding) -> Step:
    return elementwise(b, np.negative, b.kind())


def _integer(b: Binding) -> str:
    kind = b.kind()
    if kind[0] not in "us":
        raise b.unknown()
    return kind


@opcode("mul")
def mul(b: Binding) -> Step:
    if b.modifiers[0] == "wide":
        return _wide(b)
    kind = b.kind("lo", "rn")
    if kind[0] in "us" and b.modifiers[0] != "lo":
        raise b.unknown()
    return elementwise(b, np.multiply, kind)


@opcode("mad")
def mad(b: Binding) -> Step:
    if b.modifiers[0] == "wide":
        return _wide(b)
    if b.modifiers[0] != "lo":
        raise b.unknown()
    dtype = NUMPY[b.kind("lo")]
    x, y, z = b.sources(dtype)
    return compute(b.target(dtype), lambda: x * y + z)


def _wide(b: Binding) -> Step:
    kind = b.kind("wide")
    wide = NUMPY[WIDE[kind]]
    x, y = b.source(1, NUMPY[kind]), b.source(2, NUMPY[kind])
    addend = b.source(3, wide) if b.instruction.opcode == "mad" else np.zeros(b.threads, wide)
    return compute(b.target(wide), lambda: x.astype(wide) * y.astype(wide) + addend)


@opcode("fma")
def fma(b: Binding) -> Step:
    b.require("rn.f32", "rn.f32x2")
    # Pairs of floats are the two halves of 64-bit registers.
    whole = np.uint64 if b.modifiers[-1] == "f32x2" else np.uint32
    x, y, z = (row.view(np.float32) for row in b.sources(whole))
    # The product is exact in float64. The sum rounds there first, which shows in the last bit once in 2³⁰ or so.
    return compute(b.target(whole), lambda: (x.astype(np.float64) * y + z).astype(np.float32).view(whole))


@opcode("div")
def div(b: Binding) -> Step:
    b.require("s32")
    x, y = b.sources(np.int32)
    target = b.target(np.int32)

    def step(mask: Mask) -> None:
        zero = y == 0
        if (zero if mask is None else zero & mask).any():
            raise Fault("division by zero")
        wide, by = x.astype(np.int64), np.where(zero, 1, y).astype(np.int64)
        # Towards zero, where NumPy's rounds down.
        put(target, np.sign(wide) * np.sign(by) * (np.abs(wide) // np.abs(by)), mask)

    return step


@opcode("shl")
def shl(b: Binding) -> Step:
    return _shift(b, np.left_shift)


@opcode("shr")
def shr(b: Binding) -> Step:
    return _shift(b, np.right_shift)


def _shift(b: Binding, function: Any) -> Step:
    kind = b.kind()
    bits, dtype = 8 * SIZE[kind], NUMPY[kind]
    value, by = b.source(1, dtype), b.source(2, np.uint32)
    # ISA: Logic and Shift Instructions. Shifts beyond the register give 0, or copies of the sign.
    beyond = function is np.right_shift and kind[0] == "s"

    def shifted() -> Array:
        inside = function(value, np.minimum(by, bits - 1).astype(dtype))
        result: Array = np.where(by >= bits, value >> dtype(bits - 1) if beyond else dtype(0), inside)
        return result

    return compute(b.target(dtype), shifted)
