"""PTX text of one kernel, read into instructions, registers, labels and parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from slideredit_rt.errors import SliderEditError


@dataclass(frozen=True)
class Instruction:
    """One instruction of the body.

    Attributes:
        opcode: First word, such as `ld` of `ld.global.v4.b32`.
        modifiers: The other words, such as `global`, `v4` and `b32`.
        operands: Operands as written; vectors keep their braces and addresses their brackets.
        guard: Predicate register that enables the instruction, or None.
        negated: True if the guard is negated.
        line: Line in the text, from 1.
    """

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    line: int

    @property
    def name(self) -> str:
        """Opcode and modifiers, such as `ld.global.v4.b32`."""
        return ".".join((self.opcode, *self.modifiers))


@dataclass
class Kernel:
    """One entry.

    Attributes:
        name: Name of the entry.
        parameters: Type by name, such as `u64` and `u32`, in order.
        threads: Threads of a block (`.reqntid`).
        shared: Symbol of the dynamic shared memory, or None.
        registers: Type by name, such as `b32`.
        code: Instructions in the order of the text.
        labels: Position in `code` of the instruction after each label.
    """

    name: str
    parameters: dict[str, str]
    threads: int
    shared: str | None
    registers: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> Kernel:
    """Read the text of one kernel without functions.

    Raises:
        SliderEditError: The text holds several entries, a function, or a line that cannot be read.
    """
    # Comments and source positions; lines keep their numbers.
    text = re.sub(r"//.*|^\s*\.(?:loc|file)\b.*", "", text, flags=re.MULTILINE)
    heads = list(re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)", text))
    threads = re.search(r"\.reqntid (\d+)", text)
    if len(heads) != 1 or re.search(r"\.func\b", text) or threads is None:
        raise SliderEditError("the PTX is not one kernel with .reqntid and without functions; compile it with 'kernels build'")
    shared = re.search(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\]", text)
    parameters = {words[-1]: words[1].lstrip(".") for words in (part.split() for part in split(heads[0][2]))}
    kernel = Kernel(heads[0][1], parameters, int(threads[1]), shared[1] if shared else None)
    for statement, line, scope in _statements(text, text.index("{", heads[0].end())):
        _read_statement(kernel, statement, line, scope)
    return kernel


def unfenced_product(kernel: Kernel) -> Instruction | None:
    """Return a product of tensor cores that may read copied data without a `fence.proxy.async`; None if there is none.

    `wgmma` and `tcgen05.mma` read shared memory through the asynchronous proxy. What `cp.async` brought is visible there only
    after such a fence (PTX ISA, Memory Consistency Model, Proxies). Every path through the code is followed, from each
    `cp.async.wait_group`, `cp.async.wait_all` or `cp.async.mbarrier.arrive` to the next fence for shared memory.

    Args:
        kernel: Kernel to check.
    """
    pending, seen = [(0, False)], set[tuple[int, bool]]()
    while pending:
        place, arrived = state = pending.pop()
        if state in seen or place == len(kernel.code):
            continue
        seen.add(state)
        instruction = kernel.code[place]
        if arrived and instruction.name.startswith(("wgmma.mma_async", "tcgen05.mma")):
            return instruction
        if instruction.name.startswith(("cp.async.wait", "cp.async.mbarrier")):
            arrived = True
        elif re.fullmatch(r"fence\.proxy\.async(\.shared::\w+)?", instruction.name) and instruction.guard is None:
            arrived = False
        if instruction.opcode == "bra":
            pending.append((kernel.labels[instruction.operands[0]], arrived))
        if instruction.opcode not in ("bra", "ret") or instruction.guard is not None:
            pending.append((place + 1, arrived))
    return None


def split(text: str) -> list[str]:
    """Split at commas outside braces and brackets."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def vector(operand: str) -> list[str]:
    """Return the registers of an operand: those in braces, or the one."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]


def _statements(text: str, opening: int) -> Iterator[tuple[str, int, int]]:
    """Yield labels (with their colon), declarations and instructions of the body, each with its line and its scope.

    The body is scope 1, and each pair of braces in it is a scope of its own.
    """
    line, scopes, depth, pending = text.count("\n", 0, opening) + 1, 0, [0], ""
    for piece in re.split(r"(\n|;|[{}]|^\s*[$\w]+:(?=\s))", text[opening:], flags=re.MULTILINE):
        if piece == "{" and not pending.strip():
            scopes += 1
            depth.append(scopes)
        elif piece == "}" and not pending.strip():
            depth.pop()
            if depth == [0]:
                return
        elif piece == ";" or re.fullmatch(r"\s*[$\w]+:", piece):
            yield (pending + piece).strip(" \t\n;"), line + piece.count("\n"), depth[-1]
            pending = ""
        else:
            pending += piece
        line += piece.count("\n")
    raise SliderEditError("the body of the PTX does not end; the file is incomplete")


def _read_statement(kernel: Kernel, text: str, line: int, scope: int) -> None:
    if text.endswith(":"):
        kernel.labels[_scoped(text[:-1], scope)] = len(kernel.code)
    elif text.startswith(".reg"):
        _declare(kernel, text, line)
    elif not text.startswith(".pragma"):
        match = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)(?:\s+(.*))?", text, re.DOTALL)
        if match is None:
            raise SliderEditError(f"line {line} of the PTX cannot be read: {text!r}")
        negated, guard, opcode, modifiers, rest = match.groups()
        operands = split(rest or "")
        if opcode == "bra" and _scoped(operands[0], scope) in kernel.labels:
            operands = [_scoped(operands[0], scope)]
        words = tuple(modifiers.split(".")[1:])
        kernel.code.append(Instruction(opcode, words, tuple(operands), guard, negated == "!", line))


def _scoped(label: str, scope: int) -> str:
    """Return the name of a label: those of inner scopes, which only their own loops use, get the scope's number."""
    return label if scope == 1 else f"{label}@{scope}"


def _declare(kernel: Kernel, text: str, line: int) -> None:
    _, kind, names = text.split(None, 2)
    for name in split(names):
        ranged = re.fullmatch(r"(%\w+)<(\d+)>", name)
        for full in [f"{ranged[1]}{number}" for number in range(int(ranged[2]))] if ranged else [name]:
            if kernel.registers.setdefault(full, kind[1:]) != kind[1:]:
                raise SliderEditError(f"line {line} of the PTX declares {full} as {kind[1:]} and before as another type")
