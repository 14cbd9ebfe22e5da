"""Entry point of the command `slideredit-rt`."""

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
from slideredit_rt.commands import adapter, edit, engine, evaluation, kernels, quantize, serving, training
from slideredit_rt.commands.shared import Commands
from slideredit_rt.errors import SliderEditError
from slideredit_rt.notes import print_notes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slideredit-rt", description="One compiled engine, every slider: inference for SliderEdit"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="print the version and exit")
    commands = Commands(parser, "command", "COMMAND")
    for group in (edit, engine, quantize, serving, adapter, training, evaluation, kernels):
        group.add_commands(commands)
    return parser


def _silence_libraries() -> None:
    """Silence notices of third-party libraries; they would bury our own messages."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _terminate(signum: int, frame: Any) -> None:
    # An exception lets clean-up code run, so that a stopped build leaves no partial files.
    raise KeyboardInterrupt


def _prepare_streams() -> None:
    """Make the standard streams writable, even where the caller closed them."""
    # A file opened later would take the number of a closed stream and receive what libraries print to it.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - stays open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            # Characters that the terminal cannot encode and bytes that are not UTF-8 are printed as escapes.
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0 on success, 1 when a check failed, 2 for bad input, 130 when interrupted.
    """
    _prepare_streams()
    args = _parser().parse_args(argv)
    _silence_libraries()
    print_notes()
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        code: int = args.run(args)
    except SliderEditError as error:
        if args.debug:
            traceback.print_exc()
        sys.stderr.write(f"slideredit-rt: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("slideredit-rt: interrupted; no partial files were left\n")
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return code


if __name__ == "__main__":
    sys.exit(main())
