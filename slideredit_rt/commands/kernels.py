"""`slideredit-rt kernels build` and `list`."""

from __future__ import annotations

import argparse

from slideredit_rt.commands.shared import Commands, emit, listed
from slideredit_rt.files import user_path


def _kernels_build(args: argparse.Namespace) -> int:
    from slideredit_rt.kernels import aot

    work = aot.jobs(args.targets, args.dtypes, args.ranks, args.ptx_isa)
    compiled, kept = aot.build(work, args.out, processes=args.processes, progress=not args.quiet)
    result = {"out": str(args.out), "compiled": compiled, "up_to_date": kept}
    emit(args, result, [f"{args.out}: {compiled} kernels compiled, {kept} were up to date"])
    return 0


def _kernels_list(args: argparse.Namespace) -> int:
    from slideredit_rt.kernels import aot

    found = aot.built(args.folder)
    columns = ("target", "registers", "spill_bytes", "shared_bytes", "num_warps", "ptx_isa")
    width = max(len(k["file"]) for k in found)
    lines = [f"{'file':{width}}  " + "  ".join(columns)]
    lines += [f"{k['file']:{width}}  " + "  ".join(f"{k[c]!s:>{len(c)}}" for c in columns) for k in found]
    emit(args, {"kernels": found}, lines)
    return 0


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    kernel_commands = commands.group("kernels", "compile the Triton kernels ahead of time")
    kernels = kernel_commands.add("build", _kernels_build, "compile kernels to PTX with launch descriptions; needs no GPU")
    kernels.add_argument(
        "--targets",
        type=listed(str),
        default="sm80,sm86,sm89,sm90,sm100,sm120",
        help="compute capabilities, comma-separated (default: %(default)s)",
    )
    kernels.add_argument(
        "--dtypes", type=listed(str), default="bfloat16,float16", help="dtypes, comma-separated (default: %(default)s)"
    )
    kernels.add_argument(
        "--ranks", type=listed(int), default="16", help="adapter ranks from 1 to 128, comma-separated (default: %(default)s)"
    )
    kernels.add_argument("--ptx-isa", default="8.7", help="PTX version; newer ones need newer drivers (default: %(default)s)")
    kernels.add_argument("--processes", type=int, help="compiler processes (default: one per core)")
    kernels.add_argument("--out", type=user_path, required=True, help="folder to write; kernels that are up to date are kept")
    listing = kernel_commands.add("list", _kernels_list, "list compiled kernels and the registers and memory that they use")
    listing.add_argument("folder", type=user_path, metavar="DIR", help="folder written by slideredit-rt kernels build")
