"""Loads, stores and copies (ISA: Data Movement and Conversion Instructions; Warp-level Matrix Load and Store Instructions)."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ptx.binding import Binding, Step, opcode
from ptx.fault import Fault
from ptx.numbers import SIZE, UNSIGNED, Array, Mask
from slideredit_rt.kernels.ptx import vector

Loader = Callable[[Array, Array, int, int], Array]
"""Function of addresses, lanes, bytes of an element and elements, which returns `[lanes, elements]` unsigned."""


def _loader(b: Binding, space: str) -> Loader:
    def from_global(address: Array, lanes: Array, width: int, count: int) -> Array:
        buffer, place = b.state.memory.find(address, width * count)
        return buffer.load(place, width, count)

    def from_shared(address: Array, lanes: Array, width: int, count: int) -> Array:
        shared = b.state.shared
        return shared.load(shared.places(address, width * count), lanes, width, count)

    def from_parameters(address: Array, lanes: Array, width: int, count: int) -> Array:
        raw = b.state.registers.parameters
        if count != 1 or (address % width).any() or address.max() + width > raw.size:
            raise Fault("a parameter is read out of bounds or misaligned")
        data: Array = raw.view(UNSIGNED[width])[address // width][:, None]
        return data

    return {"global": from_global, "shared": from_shared, "param": from_parameters}[space]


def _form(b: Binding, registers: int) -> tuple[str, int, list[str]]:
    """Return the state space, the bytes of an element and the registers of a load or store."""
    names = vector(b.operands[registers])
    counted = (f"v{len(names)}",) if len(names) > 1 else ()
    space, kind = b.modifiers[0], b.modifiers[-1]
    if space not in ("global", "shared", "param") or b.modifiers[1:-1] != counted or kind[0] != "b":
        raise b.unknown()
    return space, SIZE[kind], names


@opcode("ld")
def ld(b: Binding) -> Step:
    space, width, names = _form(b, 0)
    # ISA: Operand Size Exceeding Instruction-Type Size. A wider register is filled up with zeros.
    rows = [b.state.registers.any_width(name) for name in names]
    address, load = b.address(1), _loader(b, space)
    if any(row.itemsize < width for row in rows):
        raise Fault("a register is narrower than what is loaded")

    def step(mask: Mask) -> None:
        lanes = b.lanes(mask)
        if lanes.size:
            data = load(address()[lanes], lanes, width, len(rows))
            for place, row in enumerate(rows):
                row[lanes] = data[:, place]

    return step


@opcode("st")
def st(b: Binding) -> Step:
    space, width, names = _form(b, 1)
    if space == "param":
        raise b.unknown()
    known, element = b.state.registers, UNSIGNED[width]
    # A wider register gives its low part.
    rows = [known.any_width(name) if known.known(name) else known.source(name, element) for name in names]
    address, shared = b.address(0), b.state.shared
    if any(row.itemsize < width for row in rows):
        raise Fault("a register is narrower than what is stored")

    def step(mask: Mask) -> None:
        lanes = b.lanes(mask)
        if lanes.size:
            data = np.stack([row[lanes].astype(element) for row in rows], 1)
            if space == "shared":
                shared.store(shared.places(address()[lanes], data.shape[1] * width), lanes, data)
            else:
                buffer, place = b.state.memory.find(address()[lanes], data.shape[1] * width)
                buffer.store(place, data)

    return step


@opcode("cp")
def cp_async(b: Binding) -> Step:
    shared = b.state.shared
    if b.modifiers == ("async", "commit_group"):
        return lambda mask: shared.commit(b.lanes(mask))
    if b.modifiers == ("async", "wait_group"):
        pending = int(b.operands[0])
        return lambda mask: shared.wait(b.lanes(mask), pending)
    b.require("async.cg.shared.global", "async.ca.shared.global")
    return _copy(b, int(b.operands[2], 0))


def _copy(b: Binding, size: int) -> Step:
    """ISA: cp.async. The fourth operand is the number of bytes to read; zeros fill the rest. `.cg` copies 16 bytes only."""
    if size not in (4, 8, 16) or (b.modifiers[1] == "cg" and size != 16):
        raise Fault(f"cp.async of {size} bytes")
    to, origin = b.address(0), b.address(1)
    given = b.source(3, np.uint32) if len(b.operands) == 4 else np.full(b.threads, size, np.uint32)

    def step(mask: Mask) -> None:
        lanes = b.lanes(mask)
        if not lanes.size:
            return
        wanted = given[lanes] != 0
        if (wanted & (given[lanes] != size)).any():
            raise Fault("cp.async of a part of the bytes")
        data = np.zeros((lanes.size, size), np.uint8)
        if wanted.any():
            buffer, place = b.state.memory.find(origin()[lanes][wanted], size)
            data[wanted] = buffer.load(place, 1, size)
        b.state.shared.begin_copy(b.state.shared.places(to()[lanes], size), lanes, data)

    return step


def _matrices(b: Binding) -> int:
    """Return the number of 8 × 8 matrices of 16-bit elements, which `.x1`, `.x2` or `.x4` states."""
    match = re.fullmatch(r"sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", ".".join(b.modifiers))
    if match is None:
        raise b.unknown()
    return int(match[1])


@opcode("ldmatrix")
def ldmatrix(b: Binding) -> Step:
    """Bind a load of matrices, of which lane `8·i + r` gives the address of row r of matrix i.

    ISA: ldmatrix. Lane `4·r + c` receives elements 2c and 2c + 1 of row r, or of column r with `.trans`.
    """
    count, transposed = _matrices(b), "trans" in b.modifiers
    targets, address, shared = b.targets(0, np.uint32, count), b.address(1), b.state.shared
    giving = b.lane % 32 < 8 * count

    def step(mask: Mask) -> None:
        b.check_whole_warps(mask)
        lanes = np.flatnonzero(giving if mask is None else giving & mask)
        rows = shared.load(shared.places(address()[lanes], 16), lanes, 2, 8).reshape(-1, count, 8, 8)
        words = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows).view(np.uint32)
        for matrix, target in enumerate(targets):
            target[b.lanes(mask)] = words[:, matrix].ravel()

    return step


@opcode("stmatrix")
def stmatrix(b: Binding) -> Step:
    """Bind a store of matrices, the reverse of ldmatrix."""
    count, transposed = _matrices(b), "trans" in b.modifiers
    rows, address, shared = b.vector(1, np.uint32, count), b.address(0), b.state.shared
    giving = b.lane % 32 < 8 * count

    def step(mask: Mask) -> None:
        b.check_whole_warps(mask)
        lanes = np.flatnonzero(giving if mask is None else giving & mask)
        elements = np.stack([row[b.lanes(mask)].reshape(-1, 8, 4) for row in rows], 1).view(np.uint16)
        words = np.ascontiguousarray(elements.swapaxes(2, 3) if transposed else elements).view(np.uint32).reshape(-1, 4)
        place = shared.places(address()[lanes], 16)
        if np.unique(place).size != place.size:
            raise Fault("a row of shared memory is written twice")
        shared.store(place, lanes, words)

    return step
