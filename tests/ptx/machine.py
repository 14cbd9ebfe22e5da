"""The machine: a kernel's instructions run for one thread block after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import ptx.arithmetic
import ptx.bits
import ptx.conversions
import ptx.tensor_cores
import ptx.transfers
import ptx.warpgroups
import ptx.warps  # noqa: F401  (each of these registers its opcodes)
from ptx.binding import OPCODES, Binding, State, Step
from ptx.fault import Fault
from ptx.memory import Buffer, Global
from ptx.numbers import Array, Mask
from ptx.registers import Registers
from ptx.shared import Shared
from slideredit_rt.kernels.ptx import Instruction, Kernel

SCHEDULES = ("together", "forwards", "backwards")
"""Order of the warps between two barriers: in step with one another, or one after the other from the first or the last."""
MOST_INSTRUCTIONS = 200_000
"""Instructions of a block after which it counts as endless. Those of the kernels' tests end long before."""


@dataclass
class Front:
    """Lanes that stand before the same instruction."""

    place: int
    lanes: Array


class Machine:
    """A kernel ready to launch.

    Args:
        kernel: Parsed kernel.
        shared_bytes: Dynamic shared memory of a block.
        shared_base: Address of its first byte. On sm90 and newer, 1,024 bytes of the system come first.

    Raises:
        Fault: The kernel has an instruction that the interpreter does not know; the message names its line.
    """

    def __init__(self, kernel: Kernel, shared_bytes: int, shared_base: int = 0) -> None:
        self.kernel = kernel
        shared = Shared(shared_bytes, shared_base, kernel.threads)
        self.state = State(kernel, Registers(kernel, shared_base), Global(), shared)
        self._warp = np.arange(kernel.threads) // 32
        self._steps = [self._bind(instruction) for instruction in kernel.code]
        self._guards = [self.state.registers.predicate(i.guard) if i.guard else None for i in kernel.code]

    def launch(self, grid: Sequence[int], arguments: Sequence[Buffer | int], schedule: str = "together") -> None:
        """Run every block of a grid along x and y. `arguments` are buffers for pointers and integers for scalars, in order.

        Raises:
            Fault: The kernel did something that is an error on hardware; the message names the line and the block.
        """
        state, parameters = self.state, self.kernel.parameters
        if len(arguments) != len(parameters):
            raise Fault(f"{len(arguments)} arguments for {len(parameters)} parameters")
        for argument, (name, kind) in zip(arguments, parameters.items(), strict=True):
            if isinstance(argument, Buffer) != (kind == "u64"):
                raise Fault(f"parameter {name} is {kind} and is given {argument!r}")
            state.registers.set_parameter(name, kind, argument.address if isinstance(argument, Buffer) else int(argument))
        state.memory.buffers = [argument for argument in arguments if isinstance(argument, Buffer)]
        with np.errstate(all="ignore"):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    self._run_block((x, y), (grid[0], grid[1]), schedule)

    def _bind(self, instruction: Instruction) -> Step | None:
        try:
            if (control := _control(instruction)) is not None:
                return None if control != "bra" or instruction.operands[0] in self.kernel.labels else _refuse("unknown label")
            if instruction.opcode not in OPCODES:
                return _refuse(f"the interpreter does not know {instruction.name}")
            return OPCODES[instruction.opcode](Binding(self.state, instruction))
        except (Fault, KeyError, ValueError, IndexError) as error:
            raise Fault(f"line {instruction.line}, {instruction.name}: {error}") from error

    def _run_block(self, block: tuple[int, int], grid: tuple[int, int], schedule: str) -> None:
        self.state.reset(block, grid)
        self._block, self._issued = block, 0
        self._alive = np.ones(self.kernel.threads, bool)
        parties = self._parties(schedule)
        waiting = [Front(0, lanes) for lanes in parties]
        while waiting:
            arrived: list[Front] = []
            for lanes in parties:
                own = [Front(front.place, front.lanes & lanes) for front in waiting]
                arrived += self._run_to_barrier([front for front in own if front.lanes.any()])
            # Lanes stand in one place each, so these are as many as have arrived.
            if sum(int(front.lanes.sum()) for front in arrived) != self._alive.sum():
                raise Fault(f"block {block}: a barrier that some warps do not reach")
            self.state.shared.barrier()
            waiting = arrived
        if self.state.products:
            raise Fault(f"block {block}: it ends with a wgmma in flight")

    def _parties(self, schedule: str) -> list[Array]:
        """Return the lanes that run together until a barrier, in their order."""
        warps = [self._warp == warp for warp in range(self._warp[-1] + 1)]
        return {"together": [np.ones(self.kernel.threads, bool)], "forwards": warps, "backwards": warps[::-1]}[schedule]

    def _run_to_barrier(self, fronts: list[Front]) -> list[Front]:
        """Run lanes until they wait at a `bar.sync` or have returned, and return those that wait.

        Those that stand lowest in the text go first, so that lanes that parted meet again.
        """
        arrived: list[Front] = []
        while fronts:
            first, *others = _merged(fronts)
            moved, at_barrier = self._advance(first, others[0].place if others else len(self._steps))
            fronts, arrived = moved + others, arrived + at_barrier
        return arrived

    def _advance(self, front: Front, limit: int) -> tuple[list[Front], list[Front]]:
        """Run lanes up to a branch, barrier or return, or to `limit`. Return where they go on, and those that wait."""
        mask: Mask = None if front.lanes.all() else front.lanes
        for place in range(front.place, limit):
            self._issued += 1
            step, guard = self._steps[place], self._guards[place]
            enabled = mask
            if guard is not None:
                enabled = ~guard if self.kernel.code[place].negated else guard.copy()
                enabled = enabled if mask is None else enabled & mask
            try:
                if self._issued > MOST_INSTRUCTIONS:
                    raise Fault("the block does not end")
                if step is None:
                    return self._transfer(place, front.lanes, front.lanes if enabled is None else enabled)
                step(enabled)
            except Fault as fault:
                instruction = self.kernel.code[place]
                raise Fault(f"line {instruction.line}, {instruction.name}, block {self._block}: {fault}") from fault
        if limit == len(self._steps):
            raise Fault("the kernel runs past its end")
        return [Front(limit, front.lanes)], []

    def _transfer(self, place: int, lanes: Array, taken: Array) -> tuple[list[Front], list[Front]]:
        """Run a branch, barrier or return of `lanes`, which `taken` of them carry out."""
        instruction = self.kernel.code[place]
        rest = lanes & ~taken
        going = [Front(place + 1, rest)] if rest.any() else []
        if not taken.any():
            return going, []
        kind = _control(instruction)
        if kind == "bra":
            if going and "uni" in instruction.modifiers:
                raise Fault("a uniform branch that lanes part at")
            return [*going, Front(self.kernel.labels[instruction.operands[0]], taken)], []
        if kind == "ret":
            self._alive &= ~taken
            return going, []
        Binding(self.state, instruction).check_whole_warps(taken)
        if going:
            raise Fault("a barrier that a predicate keeps lanes from")
        return [], [Front(place + 1, taken)]


def _control(instruction: Instruction) -> str | None:
    """Return the name of an instruction that the machine itself runs, because it changes where lanes stand."""
    if instruction.opcode == "bra" and instruction.modifiers in ((), ("uni",)):
        return "bra"
    if instruction.opcode == "ret" and not instruction.modifiers:
        return "ret"
    return "bar.sync" if instruction.name == "bar.sync" and instruction.operands == ("0",) else None


def _refuse(reason: str) -> Step:
    raise Fault(reason)


def _merged(fronts: list[Front]) -> list[Front]:
    """Return fronts by place, those at the same place as one."""
    found: dict[int, Array] = {}
    for front in fronts:
        found[front.place] = found[front.place] | front.lanes if front.place in found else front.lanes
    return [Front(place, found[place]) for place in sorted(found)]
