"""The command `slideredit-rt`."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from slideredit_rt import __version__
from slideredit_rt.commands import adapter, edit, engine, evaluation, kernels, serving, training
from slideredit_rt.commands.shared import Commands
from slideredit_rt.errors import SliderEditError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slideredit-rt", description="One compiled engine, every slider: inference for SliderEdit."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="print the version and exit")
    commands = Commands(parser, "command", "COMMAND")
    for group in (edit, engine, serving, adapter, training, evaluation, kernels):
        group.add_commands(commands)
    return parser


def _silence_libraries() -> None:
    """Third-party notices about things that nobody here uses hide our own one sentence."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _terminate(signum: int, frame: Any) -> None:
    # Lets clean-up run, so that a stopped build leaves nothing behind.
    raise KeyboardInterrupt


def _prepare_streams() -> None:
    """Make the standard streams writable whatever the caller left of them."""
    # Files that are opened later would take the numbers of closed streams, and get what libraries print there.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks, or a file name that is not UTF-8, is shown by its code.
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 1 when a verification fails, 2 for bad input, 130 when interrupted."""
    _prepare_streams()
    args = _parser().parse_args(argv)
    _silence_libraries()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code: int = args.run(args)
    except SliderEditError as error:
        if args.debug:
            traceback.print_exc()
        sys.stderr.write(f"slideredit-rt: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("slideredit-rt: interrupted; nothing was left half-written\n")
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
