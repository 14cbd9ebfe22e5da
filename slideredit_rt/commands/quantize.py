"""`slideredit-rt quantize` and `import`."""

from __future__ import annotations

import argparse

from slideredit_rt.commands.shared import Commands, add_fuse_option, counts, emit, options_given, parse_fused
from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import user_path
from slideredit_rt.settings import COMPONENT_DTYPES, RunSettings


def _quantize(args: argparse.Namespace) -> int:
    import dataclasses

    from slideredit_rt.quantization.calibrate import ActivationRun
    from slideredit_rt.quantization.precisions import get_precision
    from slideredit_rt.quantization.write import QuantizeSettings, quantize_base

    calibration = {"images": args.calibrate, "prompts": args.prompts, "adapters": tuple(args.adapter or ())}
    precision = get_precision(args.precision)
    given = [option for option in ("calibrate", "prompts", "adapter", "cases", "steps") if getattr(args, option) is not None]
    if given and not precision.quantises_activations:
        raise SliderEditError(
            f"--{given[0]} is for precisions that quantise activations, and {precision.name} does not; leave it out"
        )
    settings = QuantizeSettings(
        precision=args.precision,
        keep=tuple(args.keep),
        fuse=tuple(parse_fused(text) for text in args.fuse),
        calibration=ActivationRun(
            **calibration, run=RunSettings(args.device, args.dtype), **options_given(args, "cases", "steps")
        ),
    )
    done = quantize_base(args.base, args.out, settings, overwrite=args.overwrite, progress=not args.quiet)
    lines = [
        f"wrote {args.out} ({counts(done.layers)} linears, {done.kept} kept)",
        f"transformer {done.transformer_bytes / 1e9:.3g} GB, before {done.source_bytes / 1e9:.3g} GB",
        *([f"fused into {done.fused} linears"] if done.fused else []),
        *(
            [f"ignored {len(done.ignored)} text-encoder linears of fused LoRAs, such as {done.ignored[0]}"]
            if done.ignored
            else []
        ),
    ]
    emit(args, {"out": str(args.out), **dataclasses.asdict(done)}, lines)
    return 0


def _import(args: argparse.Namespace) -> int:
    import dataclasses

    from slideredit_rt.quantization.importing import import_base

    done = import_base(args.source, args.base, args.out, overwrite=args.overwrite)
    how = "linked" if done.links else "copied"
    lines = [
        f"wrote {args.out} ({counts(done.layers)} linears, {done.kept} others)",
        f"{how} {done.linked_bytes / 1e9:.3g} GB, converted {done.converted_bytes / 1e9:.3g} GB",
    ]
    emit(args, {"out": str(args.out), **dataclasses.asdict(done)}, lines)
    return 0


def _add_import(commands: Commands) -> None:
    sub = commands.add("import", _import, "make a base of FP8 weights that another tool wrote")
    sub.add_argument(
        "source",
        type=user_path,
        metavar="SOURCE",
        help="safetensors file of ComfyUI or Black Forest Labs, or folder of ModelOpt",
    )
    sub.add_argument(
        "--base", help="base that SOURCE was made from: a diffusers folder or a hub repository (default: SOURCE itself)"
    )
    sub.add_argument("--out", type=user_path, required=True, help="base folder to create")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def _add_quantize(commands: Commands) -> None:
    sub = commands.add("quantize", _quantize, "write a base with 8-bit or 4-bit weights, to build engines from")
    sub.add_argument("--base", required=True, help="base: portraits-kontext, a diffusers folder or a hub repository")
    sub.add_argument(
        "--precision",
        required=True,
        metavar="{fp8,int8,int4,nvfp4}",
        help="format of the projections; modulation gets 8-bit weights, embedders and the last projection are kept",
    )
    sub.add_argument("--out", type=user_path, required=True, help="base folder to create")
    add_fuse_option(sub)
    sub.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="linears to leave unquantised, with * for any characters; repeatable",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    run = sub.add_argument_group("calibration of activations, for fp8 and nvfp4")
    run.add_argument(
        "--calibrate",
        type=user_path,
        metavar="IMAGES",
        help="folder of images to edit (default, for an embedded base: images of its world)",
    )
    run.add_argument("--prompts", type=user_path, metavar="FILE", help='edits as JSON lines: {"instructions": […]}')
    run.add_argument(
        "--adapter", action="append", help="adapter whose sliders move during the edits; repeatable (default: none)"
    )
    run.add_argument("--cases", type=int, help="largest number of edits with each adapter (default: 4)")
    run.add_argument("--steps", type=int, help="denoising steps (default: 12)")
    run.add_argument("--device", default=RunSettings.device, help="device that runs the unquantised model (default: cpu)")
    run.add_argument(
        "--dtype",
        default=RunSettings.dtype,
        choices=COMPONENT_DTYPES,
        help="dtype of the unquantised model (default: bfloat16 on a GPU, float32 on the CPU)",
    )


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    _add_quantize(commands)
    _add_import(commands)
