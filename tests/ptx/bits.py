"""Logic, bit fields and comparisons (ISA: Logic and Shift Instructions, Comparison and Selection Instructions)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.arithmetic import elementwise
from ptx.binding import Binding, Step, compute, opcode
from ptx.fault import Fault
from ptx.numbers import NUMPY, Array


@opcode("and")
def bit_and(b: Binding) -> Step:
    return _logic(b, np.bitwise_and)


@opcode("or")
def bit_or(b: Binding) -> Step:
    return _logic(b, np.bitwise_or)


@opcode("xor")
def bit_xor(b: Binding) -> Step:
    return _logic(b, np.bitwise_xor)


@opcode("not")
def bit_not(b: Binding) -> Step:
    return _logic(b, np.invert)


def _logic(b: Binding, function: Any) -> Step:
    if b.modifiers != ("pred",):
        return elementwise(b, function, b.kind())
    target, sources = b.predicate(0), [b.predicate(place) for place in range(1, len(b.operands))]
    return compute(target, lambda: function(*sources))


@opcode("bfe")
def bfe(b: Binding) -> Step:
    """ISA: Integer Arithmetic Instructions, bfe. The type says whether the field's highest bit is its sign."""
    b.require("u32", "s32")
    signed = b.kind() == "s32"
    value, start, length = b.sources(np.uint32)

    def field() -> Array:
        first, count = (start & 255).astype(np.int64), (length & 255).astype(np.int64)
        if ((first + count > 32) | (count == 0)).any():
            raise Fault("a bit field that is empty or ends beyond the register")
        bits = (value.astype(np.int64) >> first) & ((1 << count) - 1)
        return (bits - ((bits >> (count - 1)) << count) if signed else bits).astype(np.uint32)

    return compute(b.target(np.uint32), field)


@opcode("prmt")
def prmt(b: Binding) -> Step:
    """ISA: prmt. Each 4 bits of the selector choose one of the 8 bytes of `{b, a}`; the fourth bit repeats its sign."""
    b.require("b32")
    low, high, selector = b.sources(np.uint32)

    def permuted() -> Array:
        eight = np.stack([low, high], 1).view(np.uint8)
        result = np.zeros((b.threads, 4), np.uint8)
        for place in range(4):
            chosen = (selector >> np.uint32(4 * place)) & np.uint32(15)
            byte = eight[b.lane, chosen & 7]
            result[:, place] = np.where(chosen & 8, np.where(byte & 128, 255, 0), byte)
        return result.view(np.uint32).ravel()

    return compute(b.target(np.uint32), permuted)


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


FLOAT_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    # NumPy says that NaN differs from everything, where PTX's `ne` says false, and its `neu` true.
    **COMPARISONS,
    "ne": lambda x, y: (x != y) & ~(np.isnan(x) | np.isnan(y)),
    "neu": np.not_equal,
}


@opcode("setp")
def setp(b: Binding) -> Step:
    kind = b.kind(b.modifiers[0])
    table = FLOAT_COMPARISONS if kind[0] == "f" else COMPARISONS
    relation = b.modifiers[0]
    if len(b.modifiers) != 2 or relation not in table or (kind[0] == "b" and relation not in ("eq", "ne")):
        raise b.unknown()
    target, (x, y) = b.predicate(0), b.sources(NUMPY[kind])
    return compute(target, lambda: table[relation](x, y))


@opcode("selp")
def selp(b: Binding) -> Step:
    dtype = NUMPY[b.kind()]
    x, y, chosen = b.source(1, dtype), b.source(2, dtype), b.predicate(3)
    return compute(b.target(dtype), lambda: np.where(chosen, x, y))
