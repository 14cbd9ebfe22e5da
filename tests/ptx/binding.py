"""Instructions bound to the state of a block, and the registry of opcodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.fault import Fault
from ptx.memory import Global
from ptx.numbers import NUMPY, Array, Mask
from ptx.registers import Registers
from ptx.shared import Shared
from slideredit_rt.kernels.ptx import Instruction, Kernel, vector

Step = Callable[[Mask], None]
"""One instruction, to be run for the lanes of a mask."""


@dataclass
class State:
    """What the instructions of a block read and write.

    Attributes:
        kernel: Parsed kernel.
        registers: Register file and parameters.
        memory: Buffers of the launch.
        shared: Shared memory of the block.
        products: `wgmma` that have not been waited for (see `ptx.warpgroups`).
        groups: Number of `wgmma` groups that were committed.
    """

    kernel: Kernel
    registers: Registers
    memory: Global
    shared: Shared
    products: list[Any] = field(default_factory=list)
    groups: int = 0

    def reset(self, block: tuple[int, int], grid: tuple[int, int]) -> None:
        self.registers.reset(block, grid)
        self.shared.reset()
        self.products, self.groups = [], 0


class Binding:
    """An instruction whose operands are looked up in a state."""

    def __init__(self, state: State, instruction: Instruction) -> None:
        self.state, self.instruction = state, instruction
        self.modifiers, self.operands = instruction.modifiers, instruction.operands
        self.threads = state.kernel.threads
        self.warps = self.threads // 32
        self.lane = np.arange(self.threads)

    def kind(self, *allowed: str) -> str:
        """Return the type, which is the last modifier. The others must be among `allowed`."""
        if not self.modifiers or self.modifiers[-1] not in NUMPY or set(self.modifiers[:-1]) - set(allowed):
            raise self.unknown()
        return self.modifiers[-1]

    def unknown(self) -> Fault:
        return Fault(f"the interpreter does not know {self.instruction.name}")

    def require(self, *accepted: str) -> None:
        """Refuse modifiers other than those of one of the accepted forms, such as `wide.s32`."""
        if ".".join(self.modifiers) not in accepted:
            raise self.unknown()

    def source(self, place: int, dtype: Any) -> Array:
        return self.state.registers.source(self.operands[place], dtype)

    def sources(self, dtype: Any, start: int = 1) -> list[Array]:
        return [self.state.registers.source(text, dtype) for text in self.operands[start:]]

    def vector(self, place: int, dtype: Any, count: int) -> list[Array]:
        """Return the registers of an operand in braces."""
        names = vector(self.operands[place])
        if len(names) != count:
            raise Fault(f"{len(names)} registers where the instruction takes {count}")
        return [self.state.registers.source(name, dtype) for name in names]

    def targets(self, place: int, dtype: Any, count: int) -> list[Array]:
        """Return the registers of an operand in braces, to be written."""
        self.vector(place, dtype, count)
        return [self.state.registers.target(name, dtype) for name in vector(self.operands[place])]

    def target(self, dtype: Any) -> Array:
        return self.state.registers.target(self.operands[0], dtype)

    def predicate(self, place: int) -> Array:
        return self.state.registers.predicate(self.operands[place])

    def address(self, place: int) -> Callable[[], Array]:
        return self.state.registers.address(self.operands[place])

    def lanes(self, mask: Mask) -> Array:
        """Return the numbers of the lanes that take part."""
        return self.lane if mask is None else np.flatnonzero(mask)

    def check_whole_warps(self, mask: Mask) -> None:
        """Instructions with `.sync.aligned` must be reached by all lanes of a warp together."""
        if mask is not None:
            count = mask.reshape(self.warps, 32).sum(1)
            if ((count != 0) & (count != 32)).any():
                raise Fault("reached by a part of a warp's lanes")


Handler = Callable[[Binding], Step]
OPCODES: dict[str, Handler] = {}
"""How an instruction is bound, by opcode."""


def opcode(name: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        OPCODES[name] = handler
        return handler

    return register


def compute(target: Array, value: Callable[[], Array]) -> Step:
    """Return a step that writes `value()` to the lanes that take part."""

    def step(mask: Mask) -> None:
        put(target, value(), mask)

    return step


def put(target: Array, value: Array, mask: Mask) -> None:
    if mask is None:
        target[:] = value
    else:
        np.copyto(target, value, where=mask)
