"""Shared by several commands: output, parsing of option values, groups of options."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slideredit_rt.assets import DEFAULT_WORLD, WORLDS
from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import user_path
from slideredit_rt.settings import COMPONENT_DTYPES, OFFLOADS, RunSettings
from slideredit_rt.sliders import Slider

if TYPE_CHECKING:
    from slideredit_rt.adapters import Fused
    from slideredit_rt.engines import RuntimeOptions
    from slideredit_rt.evaluation.own_images import OwnImageOptions


class Commands:
    """Sub-commands of one level. Each gets the options that all commands have."""

    def __init__(self, parser: argparse.ArgumentParser, dest: str, metavar: str) -> None:
        self._level = parser.add_subparsers(dest=dest, required=True, metavar=metavar)

    def add(self, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        """Add a command that calls `run`; return its parser, for the command's own options."""
        sub: argparse.ArgumentParser = self._level.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        sub.add_argument("--quiet", action="store_true", help="hide progress bars")
        sub.add_argument("--debug", action="store_true", help="print the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    def group(self, name: str, text: str) -> Commands:
        """Add a group of two-word commands that begin with `name`."""
        return Commands(self._level.add_parser(name, help=text), "what", "WHAT")


def write(text: str = "") -> None:
    """Write a line to standard output and flush it; do nothing once the reader has closed the pipe.

    Raises:
        SliderEditError: Standard output cannot be written.
    """
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes standard output on exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise SliderEditError(
                f"cannot write to standard output: {error.strerror}; the command's own files were written before"
            ) from error


def emit(args: argparse.Namespace, result: dict[str, Any], lines: Sequence[str]) -> None:
    """Print one JSON object with `--json`, else readable lines."""
    write(json.dumps(result) if args.json else "\n".join(lines))


def options_given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given, by name; callees have the defaults of the others."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def read_lines(path: Path) -> list[str]:
    """Return the non-empty lines of a text file, stripped."""
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SliderEditError(f"cannot read {str(path)!r} ({error}); give a text file with one edit per line") from None


def listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a parser of comma-separated values."""

    def parse(text: str) -> list[Any]:
        return [convert(part.strip()) for part in text.split(",") if part.strip()]

    return parse


def counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(numbers.items(), key=lambda item: -item[1]))


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def budget(text: str) -> int | str:
    """Parse a number of MiB, or `auto`."""
    if text == "auto" or text.isdecimal():
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of MiB nor 'auto'")


def parse_fused(text: str) -> Fused:
    """Parse `LORA=SCALE`, or `LORA` with scale 1. A text that names an existing file is a LoRA, even with `=` in it."""
    from slideredit_rt.adapters import Fused

    source, separator, value = text.rpartition("=")
    if not separator or user_path(text).exists():
        return Fused(text)
    try:
        scale = float(value)
    except ValueError:
        scale = math.nan
    if not source or math.isnan(scale):
        raise SliderEditError(f"--fuse {text!r} has scale {value!r}, not a number; write it as style.safetensors=0.8")
    return Fused(source, scale)


def add_fuse_option(sub: argparse.ArgumentParser) -> None:
    """Add the option whose values `parse_fused` reads."""
    sub.add_argument(
        "--fuse",
        action="append",
        default=[],
        metavar="LORA[=SCALE]",
        help="permanent LoRA to add to the weights first, such as one for fewer steps; repeatable (default scale: 1)",
    )


def runtime_options(args: argparse.Namespace) -> RuntimeOptions | None:
    """Return the run options of a TensorRT engine; None if none were given."""
    given: dict[str, Any] = {}
    if args.weight_budget_mib is not None:
        given["weight_budget"] = "auto" if args.weight_budget_mib == "auto" else args.weight_budget_mib * 2**20
    if args.cuda_graphs is not None:
        given["cuda_graphs"] = args.cuda_graphs == "on"
    if not given:
        return None
    from slideredit_rt.engines import RuntimeOptions

    return RuntimeOptions(**given)


def run_settings(args: argparse.Namespace) -> RunSettings:
    """Return how the options say that an engine is run.

    Raises:
        SliderEditError: An option is not valid, or the device does not exist.
    """
    settings = RunSettings(args.device, args.dtype, args.offload, args.threads, runtime_options(args))
    settings.choose_device()
    return settings


def add_device_option(sub: argparse._ActionsContainer, what: str, option: str = "--device") -> None:
    """Add an option for the device of work that has no engine (see `slideredit_rt.settings.pick_device`).

    Args:
        sub: Parser of the command, or a group of options.
        what: Work that runs on the device, for the help.
        option: Name of the option.
    """
    sub.add_argument(option, help=f"device of {what}: cpu, cuda, cuda:N or auto, a GPU if there is one (default: auto)")


def add_world_option(sub: argparse.ArgumentParser, what: str, *, follows: str = "") -> None:
    """Add an option for an embedded world.

    Args:
        sub: Parser of the command.
        what: Things that come from the world, for the help.
        follows: Things that determine the world if they are embedded, for the help; empty if nothing does. The command then
            asks `assets.choose_world` for it.
    """
    default = f"that of {follows}, else {DEFAULT_WORLD}" if follows else DEFAULT_WORLD
    sub.add_argument(
        "--world",
        choices=WORLDS,
        default=None if follows else DEFAULT_WORLD,
        help=f"embedded world of the {what} (default: {default})",
    )


def add_run_options(sub: argparse.ArgumentParser) -> None:
    """Add the options that `run_settings` reads."""
    sub.add_argument(
        "--device",
        default=RunSettings.device,
        help="device of the engine, the encoders and the autoencoder: cpu, cuda, cuda:N or auto, the backend's choice "
        "(default: %(default)s)",
    )
    sub.add_argument(
        "--dtype",
        default=RunSettings.dtype,
        choices=COMPONENT_DTYPES,
        help="dtype of encoders and autoencoder (default: bfloat16 on a GPU, float32 on the CPU)",
    )
    sub.add_argument(
        "--offload",
        default=RunSettings.offload,
        choices=OFFLOADS,
        help="parts to keep in host memory, for GPUs with little memory: none; encoders, with images in tiles; all, which "
        "also streams weights of a tensorrt engine; auto, the first of these that fits (default: %(default)s)",
    )
    sub.add_argument("--threads", type=int, help="CPU threads of the backend (default: its own choice)")
    _add_runtime_options(sub)


def _add_runtime_options(sub: argparse.ArgumentParser) -> None:
    """Add the options that `runtime_options` reads."""
    tensorrt = sub.add_argument_group("options of tensorrt and tensorrt-rtx engines")
    tensorrt.add_argument(
        "--weight-budget-mib",
        type=budget,
        metavar="N|auto",
        help="weights to keep on the GPU, in MiB; the rest is streamed (default: all)",
    )
    tensorrt.add_argument("--cuda-graphs", choices=("on", "off"), help="replay captured CUDA graphs (default: on)")


def with_members(args: argparse.Namespace, sliders: Sequence[Slider]) -> list[Slider]:
    """Return the sliders, each with the bank member from the `--member` in the same position."""
    if not args.member:
        return list(sliders)
    if len(args.member) != len(sliders):
        raise SliderEditError(
            f"{len(args.member)} --member and {len(sliders)} --slider were given; give one member per slider, in the same order"
        )
    return [replace(s, adapter=member) for s, member in zip(sliders, args.member, strict=True)]


def add_member_option(sub: argparse.ArgumentParser) -> None:
    """Add the option that `with_members` reads."""
    sub.add_argument(
        "--member",
        action="append",
        metavar="NAME",
        help="bank member that a slider scales; one per --slider, in the same order",
    )


def own_image_options(args: argparse.Namespace) -> OwnImageOptions | None:
    """Return the user's own images and scorers; None if none were given."""
    from slideredit_rt.evaluation.own_images import OwnImageOptions

    own = options_given(args, "images", "prompts", "attribute_scorers", "distance_scorers")
    if args.scorer_device is not None:
        own["device"] = args.scorer_device
    if args.scorer:
        if odd := [text for text in args.scorer if "=" not in text]:
            raise SliderEditError(f"--scorer {odd[0]!r} has no source; write it as clip=FOLDER")
        named = dict(text.split("=", 1) for text in args.scorer)
        own["sources"] = {name: os.path.expanduser(source) for name, source in named.items()}
    if own and not {"images", "prompts"} <= set(own):
        raise SliderEditError("your own images and their scorers need both --images and --prompts; give both")
    return OwnImageOptions(**own) if own else None


def add_own_image_options(sub: argparse.ArgumentParser, *, distances: bool) -> None:
    """Add the options that `own_image_options` reads.

    Args:
        sub: The command's parser.
        distances: Include the choice of distance scorers.
    """
    own = sub.add_argument_group("your own images instead of scenes of an embedded world")
    own.add_argument("--images", type=user_path, metavar="DIR", help="folder of images to edit")
    own.add_argument(
        "--prompts", type=user_path, metavar="FILE", help='edits as JSON lines: {"instructions": […], "attributes": […]}'
    )
    own.add_argument("--attribute-scorers", type=listed(str), help="any of clip, siglip, blip-itm (default: clip,siglip)")
    if distances:
        own.add_argument(
            "--distance-scorers",
            type=listed(str),
            help="any of lpips-alex, lpips-vgg, dinov2, arcface (default: lpips-alex,dinov2)",
        )
    else:
        sub.set_defaults(distance_scorers=None)
    own.add_argument(
        "--scorer",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="folder or repository of a scorer's model; repeatable",
    )
    add_device_option(own, "the scorers' models", "--scorer-device")
