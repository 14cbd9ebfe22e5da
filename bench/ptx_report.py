"""Report what the kernels' main loops consist of, from their PTX and from ptxas; needs no GPU.

Shows without a GPU whether a change made an inner loop worse: its instructions by kind, the bytes that a block loads from
global memory for each multiply-accumulate, registers, spilled bytes, and how many warps fit on a multiprocessor.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import atomic_file
from slideredit_rt.kernels import aot
from slideredit_rt.kernels.configurations import SHARED_KIB
from slideredit_rt.kernels.ptx import Instruction, Kernel, parse, vector

COMMAND = "python -m slideredit_rt.bench.ptx_report"
WARP = 32
_REGISTERS, _REGISTER_UNIT, _PARTITIONS = 65536, 256, 4
_SYSTEM_BYTES = 1024
# Largest number of warps and blocks on a multiprocessor by compute capability (CUDA C++ Programming Guide, technical
# specifications).
_MOST_WARPS = {80: 64, 86: 48, 87: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48}
_MOST_BLOCKS = {80: 32, 86: 16, 87: 16, 89: 24, 90: 32, 100: 32, 103: 32, 120: 24}
_SHOWN = r"(wgmma|mma|tcgen05\.mma|fma|cp\.async|ld\.global|ld\.shared|ldmatrix|bar|st\.shared)\S*( |$)"
"""Kinds in the table; the JSON file has all."""
_ELEMENT_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


def _access(i: Instruction) -> str:
    return f"{i.opcode}.{i.modifiers[0]} {_width(i)} B"


def _width(i: Instruction) -> int:
    """Return the bytes that one lane loads, stores or copies."""
    if i.opcode == "cp":
        return int(i.operands[2], 0)
    return _ELEMENT_BYTES[i.modifiers[-1][1:]] * len(vector(i.operands[0 if i.opcode == "ld" else 1]))


def _copy(i: Instruction) -> str:
    return f"cp.async {_width(i)} B" if "shared" in i.modifiers else f"cp.async.{i.modifiers[1]}"


def _product(i: Instruction) -> str:
    """Return opcode, shape and operand type, such as `wgmma m64n256k16 bf16`, or the name of what belongs to products."""
    if shape := next((word for word in i.modifiers if re.match(r"m\d+n\d+k\d+$", word)), None):
        return f"{i.opcode} {shape} {i.modifiers[-2]}"
    return f"{i.opcode}.{i.modifiers[0]}" + "".join(f" {word}" for word in i.modifiers if word.startswith("kind::"))


_KINDS: dict[str, Callable[[Instruction], str]] = {
    "ld": _access,
    "st": _access,
    "cp": _copy,
    "mma": _product,
    "wgmma": _product,
    "tcgen05": _product,
    "fma": lambda i: i.name,
    "bar": lambda i: i.name,
    "ldmatrix": lambda i: "ldmatrix",
    "stmatrix": lambda i: "stmatrix",
    "fence": lambda i: "fence",
    "mbarrier": lambda i: f"mbarrier.{i.modifiers[0]}",
    "shfl": lambda i: "shfl",
    "cvt": lambda i: "cvt",
}
"""Kind of an instruction by its opcode; all others are `other`."""


@dataclass(frozen=True)
class Section:
    """A loop that multiplies, or the whole body of a kernel without one.

    Attributes:
        lines: First and last line of the text.
        loop: True for a loop, False for a whole body.
        kinds: Number of instructions by kind.
        macs: Multiply-accumulates of a block in one pass; None if the text does not say (`tcgen05`).
        loaded_bytes: Bytes that a block loads from global memory in one pass, if no lane is masked.
    """

    lines: tuple[int, int]
    loop: bool
    kinds: dict[str, int]
    macs: int | None
    loaded_bytes: int

    @property
    def bytes_per_mac(self) -> float | None:
        """Bytes loaded from global memory for each multiply-accumulate."""
        return round(self.loaded_bytes / self.macs, 5) if self.macs else None


def sections(kernel: Kernel) -> list[Section]:
    """Return the innermost loops that multiply, in the order of the text, or the whole body if there are none."""
    spans = []
    for end, instruction in enumerate(kernel.code):
        if instruction.opcode == "bra" and (start := kernel.labels[instruction.operands[0]]) <= end:
            spans.append((start, end + 1))
    multiplying = [span for span in spans if _multiplies(kernel.code[slice(*span)])]
    inner = [s for s in multiplying if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in multiplying)]
    return [_section(kernel, *span, True) for span in inner] or [_section(kernel, 0, len(kernel.code), False)]


def _multiplies(code: Iterable[Instruction]) -> bool:
    return any(i.opcode in ("mma", "fma", "tcgen05") or i.modifiers[:1] == ("mma_async",) for i in code)


def _section(kernel: Kernel, start: int, end: int, loop: bool) -> Section:
    code = kernel.code[start:end]
    kinds = Counter(_KINDS[i.opcode](i) if i.opcode in _KINDS else "other" for i in code)
    macs = [_macs(i, kernel.threads) for i in code]
    loads = [
        i for i in code if (i.opcode == "ld" and i.modifiers[0] == "global") or (i.opcode == "cp" and "shared" in i.modifiers)
    ]
    return Section(
        (code[0].line, code[-1].line),
        loop,
        dict(sorted(kinds.items())),
        None if None in macs else sum(count for count in macs if count),
        kernel.threads * sum(map(_width, loads)),
    )


def _macs(i: Instruction, threads: int) -> int | None:
    """Return the multiply-accumulates of a block that runs an instruction once, and None for those of `tcgen05.mma`."""
    if i.opcode == "tcgen05" and i.modifiers[0] == "mma":
        return None
    if i.opcode == "fma":
        return threads * (2 if i.modifiers[-1] == "f32x2" else 1)
    shape = re.search(r"\bm(\d+)n(\d+)k(\d+)\b", i.name) if i.opcode in ("mma", "wgmma") else None
    if shape is None:
        return 0
    m, n, k = map(int, shape.groups())
    return m * n * k * threads // (4 * WARP if i.opcode == "wgmma" else WARP)


def blocks_per_multiprocessor(description: dict[str, Any]) -> int:
    """Return how many blocks of a kernel fit on a multiprocessor at the same time."""
    capability, warps = int(description["target"][2:]), description["num_warps"]
    # Registers are given to warps in units, and a warp's come from one of four partitions.
    each = -(-description["registers"] * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _PARTITIONS * (_REGISTERS // _PARTITIONS // each) // warps
    # A multiprocessor has 1 KiB more than a block may use, and every block takes 1 KiB for the system.
    by_shared = (SHARED_KIB[capability] * 1024 + _SYSTEM_BYTES) // (description["shared_bytes"] + _SYSTEM_BYTES)
    return int(min(by_registers, by_shared, _MOST_WARPS[capability] // warps, _MOST_BLOCKS[capability]))


def report(text: str, description: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of one kernel, given its PTX and its description from `kernels build`."""
    blocks = blocks_per_multiprocessor(description)
    warps = blocks * description["num_warps"] / _MOST_WARPS[int(description["target"][2:])]
    facts = ("kernel", "target", "dtype", "rank", "configuration", "registers", "spill_bytes", "shared_bytes", "num_warps")
    found = [asdict(section) | {"bytes_per_mac": section.bytes_per_mac} for section in sections(parse(text))]
    return {name: description[name] for name in facts} | {"blocks": blocks, "occupancy": round(warps, 3), "sections": found}


def measure(jobs: Sequence[aot.Job]) -> list[dict[str, Any]]:
    """Compile kernels and report on each."""
    with tempfile.TemporaryDirectory() as folder:
        aot.build(jobs, Path(folder), processes=1)
        return [report((Path(folder) / d["file"]).read_text(), d) for d in aot.built(Path(folder))]


def table(kernels: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown with a line for every loop."""
    names = ("kernel", "registers", "spilled", "shared", "blocks", "warps", "B/MAC", "products, copies and barriers")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for k in kernels:
        for section in k["sections"]:
            counts = section["kinds"].items()
            shown = [f"{count} {kind}" for kind, count in counts if re.match(_SHOWN, kind)]
            name = f"{k['target']} {k['kernel']} {aot.DTYPES[k['dtype']]} r{k['rank']} {k['configuration']}"
            ratio = "–" if section["bytes_per_mac"] is None else f"{section['bytes_per_mac']:.4f}"
            cells = (k["registers"], k["spill_bytes"], k["shared_bytes"], k["blocks"], f"{k['occupancy']:.0%}", ratio)
            lines.append(
                f"| {name}{'' if section['loop'] else ', whole'} | {' | '.join(map(str, cells))} | {', '.join(shown)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the report as JSON and as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="results folder (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", default=["sm80", "sm89", "sm90", "sm100", "sm120"], help="compute capabilities")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="dtypes of the tensors")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64], help="adapter ranks")
    args = parser.parse_args()
    try:
        kernels = measure(aot.jobs(args.targets, args.dtypes, args.ranks))
        write(kernels, args.out)
    except SliderEditError as error:
        parser.error(str(error))
    sys.stdout.write(table(kernels))
    return 0


def write(kernels: Sequence[dict[str, Any]], out: Path) -> None:
    """Write `ptx.json` and `ptx.md` into a folder."""
    facts = {"command": COMMAND, "triton": triton.__version__, "kernels": kernels}
    with atomic_file(out / "ptx.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
    with atomic_file(out / "ptx.md") as temporary:
        temporary.write_text(
            f"# Main loops of the kernels\n\nTriton {triton.__version__}. Reproduce: `{COMMAND}`.\n\n"
            "`blocks` is the number of blocks that fit on a multiprocessor, `warps` the share of its warps that they make up,\n"
            "and `B/MAC` the bytes that a block loads from global memory for each multiply-accumulate.\n\n" + table(kernels)
        )


if __name__ == "__main__":
    sys.exit(main())
