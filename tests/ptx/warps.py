"""Exchange between the lanes of a warp (ISA: shfl.sync, redux.sync, bar.warp.sync)."""

from __future__ import annotations

import numpy as np

from ptx.binding import Binding, Step, opcode, put
from ptx.fault import Fault
from ptx.numbers import Mask

EVERY_LANE = ("-1", "0xffffffff")


@opcode("shfl")
def shfl(b: Binding) -> Step:
    """ISA: shfl.sync. Bits 0 to 4 of the fourth operand are the last lane, bits 8 to 12 choose the segment's lanes."""
    b.require("sync.bfly.b32", "sync.idx.b32")
    if b.operands[4] not in EVERY_LANE:
        raise b.unknown()
    exchange = b.modifiers[1] == "bfly"
    target, row, operand, control = b.target(np.uint32), *(b.source(place, np.uint32) for place in (1, 2, 3))
    own = b.lane % 32

    def step(mask: Mask) -> None:
        b.check_whole_warps(mask)
        by, last, segment = ((value & 31).astype(np.int64) for value in (operand, control, control >> 8))
        other = own ^ by if exchange else (own & segment) | (by & ~segment)
        other = np.where(other <= ((own & segment) | (last & ~segment)), other, own)
        put(target, row[b.lane - own + other], mask)

    return step


@opcode("redux")
def redux(b: Binding) -> Step:
    b.require("sync.max.s32")
    target, (row, members) = b.target(np.int32), b.sources(np.int32)

    def step(mask: Mask) -> None:
        b.check_whole_warps(mask)
        if (members != -1).any():
            raise Fault("a reduction of a part of a warp")
        put(target, np.repeat(row.reshape(b.warps, 32).max(1), 32), mask)

    return step


@opcode("bar")
def bar(b: Binding) -> Step:
    """Bind `bar.warp.sync`. The machine itself runs `bar.sync`, which all warps of a block wait at."""
    b.require("warp.sync")
    if b.operands[0] not in EVERY_LANE:
        raise Fault("bar.warp.sync of a part of a warp")
    return b.check_whole_warps
