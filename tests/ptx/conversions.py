"""Moves and conversions between registers (ISA: Data Movement and Conversion Instructions, mov, cvt)."""

from __future__ import annotations

import numpy as np

from ptx.binding import Binding, Step, compute, opcode, put
from ptx.numbers import NARROWED, NUMPY, SIZE, UNSIGNED, WIDENED, Mask, tf32_bits
from slideredit_rt.kernels.ptx import vector


@opcode("mov")
def mov(b: Binding) -> Step:
    if b.modifiers == ("pred",):
        known = {"-1": True, "1": True, "0": False}
        value = b.predicate(1) if b.state.registers.known(b.operands[1]) else np.full(b.threads, known[b.operands[1]])
        return compute(b.predicate(0), lambda: value)
    kind = b.kind()
    if b.operands[0].startswith("{"):
        return _unpack(b, kind)
    if b.operands[1].startswith("{"):
        return _pack(b, kind)
    row = b.source(1, NUMPY[kind])
    return compute(b.target(NUMPY[kind]), lambda: row)


def _pack(b: Binding, kind: str) -> Step:
    """The first element of a vector is the lowest part."""
    count = len(vector(b.operands[1]))
    parts, whole = b.vector(1, UNSIGNED[SIZE[kind] // count], count), UNSIGNED[SIZE[kind]]
    return compute(b.target(whole), lambda: np.stack(parts, 1).view(whole).ravel())


def _unpack(b: Binding, kind: str) -> Step:
    names = vector(b.operands[0])
    part = UNSIGNED[SIZE[kind] // len(names)]
    whole = b.source(1, UNSIGNED[SIZE[kind]])
    # `_` discards a part.
    targets = [None if name == "_" else b.state.registers.target(name, part) for name in names]

    def step(mask: Mask) -> None:
        parts = whole.copy().view(part).reshape(b.threads, -1)
        for place, target in enumerate(targets):
            if target is not None:
                put(target, parts[:, place], mask)

    return step


@opcode("cvt")
def cvt(b: Binding) -> Step:
    if b.modifiers[0] == "rn" and b.modifiers[2:] == ("f32",):
        return _narrow(b, b.modifiers[1])
    if b.modifiers == ("rna", "tf32", "f32"):
        row = b.source(1, np.uint32)
        return compute(b.target(np.uint32), lambda: tf32_bits(row))
    into, origin = b.modifiers
    if into == "f32" and origin in WIDENED:
        short = b.source(1, np.uint16)
        return compute(b.target(np.float32), lambda: WIDENED[origin](short))
    if into[0] not in "us" or origin[0] not in "us":
        raise b.unknown()
    number = b.source(1, NUMPY[origin])
    return compute(b.target(NUMPY[into]), lambda: number.astype(NUMPY[into]))


def _narrow(b: Binding, into: str) -> Step:
    """ISA: cvt. Of two operands, the first becomes the upper half."""
    narrowed = NARROWED[into.removesuffix("x2")]
    if not into.endswith("x2"):
        row = b.source(1, np.float32)
        return compute(b.target(np.uint16), lambda: narrowed(row))
    high, low = b.sources(np.float32)
    return compute(b.target(np.uint32), lambda: (narrowed(high).astype(np.uint32) << np.uint32(16)) | narrowed(low))
