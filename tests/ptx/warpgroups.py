"""Products of four warps (ISA: Asynchronous Warpgroup-Level Matrix Instructions, wgmma)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ptx.binding import Binding, State, Step, opcode
from ptx.fault import Fault
from ptx.numbers import Array, Mask, operands_of_tensor_cores
from ptx.shared import Shared
from slideredit_rt.kernels.ptx import vector

TEAM = 128
"""Lanes of a warpgroup."""
ROW_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a contiguous row by the descriptor's swizzling mode; 0 is none."""


@dataclass
class Tile:
    """Shared memory that a product reads until its group has been waited for."""

    group: int
    team: int
    place: Array
    raw: Array


@dataclass
class Held:
    """A register that a product reads until its group has been waited for."""

    group: int
    row: Array
    before: Array


@dataclass
class Product:
    """A product in flight. Its accumulators are NaN until it has been waited for."""

    group: int
    names: list[str]
    rows: list[Array]
    values: Array
    tiles: list[Tile]
    held: list[Held]

    def release(self, shared: Shared, done: int) -> None:
        """Check that what groups before `done` read was left alone, and let it go."""
        for tile in self.tiles:
            if tile.group < done:
                if (shared.peek(tile.place) != tile.raw).any():
                    raise Fault("shared memory changed under a wgmma in flight")
                shared.hold_by_warpgroup(tile.place, tile.team)
        for register in self.held:
            if register.group < done and (register.row != register.before).any():
                raise Fault("a register changed under a wgmma in flight")
        self.tiles = [tile for tile in self.tiles if tile.group >= done]
        self.held = [register for register in self.held if register.group >= done]

    def finish(self) -> None:
        for row, value in zip(self.rows, self.values, strict=True):
            if not np.isnan(row).all():
                raise Fault("an accumulator was written under a wgmma in flight")
            row[:] = value


@opcode("fence")
def fence(b: Binding) -> Step:
    b.require("proxy.async.shared::cta")
    return lambda mask: b.state.shared.fence()


@opcode("wgmma")
def wgmma(b: Binding) -> Step:
    if b.modifiers == ("fence", "sync", "aligned"):
        return b.check_whole_warps
    if b.modifiers == ("commit_group", "sync", "aligned"):
        return lambda mask: _commit(b.state, mask)
    if b.modifiers == ("wait_group", "sync", "aligned"):
        pending = int(b.operands[0])
        return lambda mask: _wait(b.state, mask, pending)
    return Multiplication(b).step


def _whole_block(mask: Mask) -> None:
    if mask is not None:
        raise Fault("reached by a part of the block, which the interpreter does not follow")


def _commit(state: State, mask: Mask) -> None:
    _whole_block(mask)
    state.groups += 1


def _wait(state: State, mask: Mask, pending: int) -> None:
    """Finish all products but those of the last `pending` groups.

    Products chain in their accumulators: what an earlier group of a chain read is free once that group is done.
    """
    _whole_block(mask)
    done = state.groups - pending
    for product in state.products:
        product.release(state.shared, done)
        if product.group < done:
            product.finish()
    state.products = [product for product in state.products if product.group >= done]


class Multiplication:
    """D = A · B + D with A `[64, K]` in registers or shared memory, B `[K, N]` in shared memory, K of 32 bytes.

    ISA: Register Fragments and Shared Memory Matrix Layout. Both matrices are K-major. In fragments of A and D, warp w of the
    warpgroup holds rows 16w to 16w + 15 as in `mma`; D repeats it for every 8 columns.
    """

    def __init__(self, b: Binding) -> None:
        form = re.fullmatch(r"mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3", ".".join(b.modifiers))
        if form is None or int(form[2]) != (8 if form[3] == "tf32" else 16):
            raise b.unknown()
        self._b, self._columns, self._kind = b, int(form[1]), form[3]
        self._names = vector(b.operands[0])
        self._target = b.targets(0, np.float32, self._columns // 2)
        in_registers = b.operands[1].startswith("{")
        self._left = b.vector(1, np.uint32, 4) if in_registers else []
        self._descriptors = [] if in_registers else [b.source(1, np.uint64)]
        self._right, self._accumulate = b.source(2, np.uint64), b.predicate(3)
        # Signs of both, then for 16-bit types whether each matrix in shared memory is transposed.
        transposed = 0 if self._kind == "tf32" else 1 if in_registers else 2
        if list(b.operands[4:]) != ["1", "1", *["0"] * transposed] or b.threads % TEAM:
            raise b.unknown()

    def step(self, mask: Mask) -> None:
        _whole_block(mask)
        state = self._b.state
        chain = [product for product in state.products if set(product.names) & set(self._names)]
        if any(product.names != self._names for product in chain):
            raise Fault("a part of the accumulators of a wgmma in flight")
        start = chain[-1].values if chain else np.stack(self._target)
        tiles = [tile for product in chain for tile in product.tiles]
        held = [register for product in chain for register in product.held]
        values = np.empty_like(start)
        for team in range(self._b.threads // TEAM):
            lanes = slice(TEAM * team, TEAM * (team + 1))
            read = [self._tile(self._right, team, self._columns)]
            if self._descriptors:
                read.append(self._tile(self._descriptors[0], team, 64))
                left = self._values(read[1].raw, 64)
            else:
                left = self._fragment(lanes)
            product = left @ self._values(read[0].raw, self._columns).T
            values[:, lanes] = np.where(self._accumulate[lanes], start[:, lanes], 0) + self._spread(product)
            tiles += read
        held += [Held(state.groups, row, row.copy()) for row in self._left]
        for row in self._target:
            row[:] = np.nan
        state.products = [product for product in state.products if product not in chain]
        state.products.append(Product(state.groups, self._names, self._target, values, tiles, held))

    def _values(self, raw: Array, rows: int) -> Array:
        return operands_of_tensor_cores(raw, self._kind).reshape(rows, -1)

    def _fragment(self, lanes: slice) -> Array:
        """Return A `[64, K]` of registers, whose order is that of `mma`."""
        bits = np.stack([row[lanes] for row in self._left])
        a = operands_of_tensor_cores(bits, self._kind).reshape(4, 4, 8, -1)  # register, warp, row, columns
        upper, lower = np.concatenate([a[0], a[2]], -1), np.concatenate([a[1], a[3]], -1)
        return np.concatenate([upper, lower], 1).reshape(64, -1)

    def _spread(self, product: Array) -> Array:
        """Return `[64, N]` as registers `[N / 2, 128]`."""
        parts = product.reshape(4, 2, 8, self._columns // 8, 4, 2)  # warp, half, row, eight columns, pair, column
        return parts.transpose(3, 1, 5, 0, 2, 4).reshape(self._columns // 2, TEAM)

    def _tile(self, descriptor: Array, team: int, rows: int) -> Tile:
        given = descriptor[TEAM * team : TEAM * (team + 1)]
        if (given != given[0]).any():
            raise Fault("lanes of a warpgroup give different descriptors")
        shared = self._b.state.shared
        place = shared.places(addresses(int(given[0]), rows).ravel(), 16)
        return Tile(self._b.state.groups, team, place, shared.load_by_warpgroup(place, team))


def addresses(descriptor: int, rows: int) -> Array:
    """Return the address `[rows, 2]` of each 16 bytes of a K-major matrix whose rows are 32 bytes.

    ISA: Matrix Descriptor Format. Bits 0 to 13 are the start, 16 to 29 the leading and 32 to 45 the stride dimension's byte
    offset, all without their low 4 bits; 49 to 51 the base offset; 62 and 63 the swizzling mode. Groups of eight rows lie a
    stride apart. Without swizzling, eight rows of 16 bytes are contiguous, and the next 16 bytes of the rows lie a leading
    offset further. With it, address bits 7 and up (three, two or one of them) are added, modulo two, to those from 4 up.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Fault("a matrix descriptor with a base offset")
    row, chunk = np.arange(rows)[:, None], np.arange(2)[None, :]
    mode = descriptor >> 62
    width = ROW_BYTES[mode]
    address: Array = start + row // 8 * stride + row % 8 * width + chunk * (leading if mode == 0 else 16)
    swizzled: Array = address ^ ((address >> 7 & (width // 16 - 1)) << 4)
    return swizzled
