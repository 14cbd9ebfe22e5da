"""`slideredit-rt adapter show`, `convert`, `replace` and `calibrate`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from slideredit_rt.commands.shared import (
    Commands,
    add_own_image_options,
    add_run_options,
    add_world_option,
    emit,
    options_given,
    own_image_options,
    run_settings,
)
from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import check_engine_folder, user_path

if TYPE_CHECKING:
    from slideredit_rt.families import Family


def _base_of_adapter(args: argparse.Namespace) -> tuple[Family, Any] | None:
    """Return the family of `--base` and its transformer without weights; None if no base was given."""
    from slideredit_rt.assets import resolve_base
    from slideredit_rt.checkpoint import meta_transformer
    from slideredit_rt.families import family_of

    if args.base is None:
        return None
    folder = resolve_base(args.base)
    return family_of(folder), meta_transformer(folder / "transformer")


def _adapter_show(args: argparse.Namespace) -> int:
    import dataclasses

    from slideredit_rt.adapters import adapter_report, load_adapter, match_adapter

    base = _base_of_adapter(args)
    adapter = load_adapter(args.adapter, base and base[0], mixed_dtypes=True)
    report = adapter_report(adapter)
    ranks = ", ".join(f"{rank} ({count} linears)" for rank, count in report["ranks"].items())
    lines = [
        f"adapter      {adapter.source}",
        f"family       {adapter.family}",
        f"kind         {adapter.kind}",
        f"rank         {ranks}",
        *([f"members      {', '.join(adapter.members)}"] if adapter.members else []),
        f"dtype        {adapter.dtype}",
        f"size         {report['parameters']:,} parameters",
        f"norm         {report['norm']:.4g} of B·A, over all linears",
        f"fingerprint  {report['fingerprint']}",
        f"training     {', '.join(f'{key} {value}' for key, value in adapter.training.items()) or 'not recorded'}",
        f"{'linears':<52} {'rows':<6} {'count':>5}  {'rank':<8} norm",
    ]
    for name, target in report["targets"].items():
        target_ranks = ",".join(map(str, target["ranks"]))
        lines.append(f"{name:<52} {target['rows'] or '-':<6} {target['modules']:>5}  {target_ranks:<8} {target['norm']:.4g}")
    if adapter.ignored:
        lines.append(f"ignored      {len(adapter.ignored)} linears of the text encoders, such as {adapter.ignored[0]}")
    if base is not None:
        match = dataclasses.asdict(match_adapter(adapter, *base))
        report["base"] = {"source": str(args.base), **match}
        lines.append(f"on {args.base}: " + ", ".join(f"{len(names)} {what}" for what, names in match.items()))
        lines += [f"{what:<12} {name}" for what, names in match.items() if what != "matched" for name in names]
    emit(args, report, lines)
    return 0


def _adapter_convert(args: argparse.Namespace) -> int:
    from slideredit_rt.adapters import DTYPES, fit_adapter, load_adapter, save_adapter

    if args.allow_partial and args.base is None:
        raise SliderEditError("--allow-partial drops modules that the base lacks, so it needs a base; name one with --base")
    if args.destination.exists():
        raise SliderEditError(f"{str(args.destination)!r} exists already; choose another name")
    base = _base_of_adapter(args)
    loaded = load_adapter(args.source, base and base[0], mixed_dtypes=args.dtype is not None)
    adapter = loaded if base is None else fit_adapter(loaded, *base, allow_partial=args.allow_partial)
    save_adapter(adapter, args.destination, args.to, dtype=args.dtype and DTYPES[args.dtype])
    dropped = [*loaded.ignored, *(name for name in loaded.pairs if name not in adapter.pairs)]
    result = {
        "out": str(args.destination),
        "format": args.to,
        "family": adapter.family,
        "kind": adapter.kind,
        "modules": len(adapter.pairs),
        "dropped": dropped,
    }
    lines = [f"wrote {args.destination} ({args.to}; {adapter.kind}, rank {adapter.rank}, {len(adapter.pairs)} linears)"]
    emit(args, result, [*lines, *(f"dropped {name}" for name in dropped)])
    return 0


def _adapter_replace(args: argparse.Namespace) -> int:
    check_engine_folder(args.engine)
    from slideredit_rt.export.replace import replace_engine_adapter

    manifest = replace_engine_adapter(args.engine, args.adapter)
    result = {"engine": str(args.engine), "manifest": manifest.to_json()}
    emit(args, result, [f"{args.engine} now has the adapter {', '.join(args.adapter)}"])
    return 0


def _adapter_calibrate(args: argparse.Namespace) -> int:
    if args.engine is not None:
        check_engine_folder(args.engine)

    import dataclasses

    from slideredit_rt.adapters import load_adapter, save_adapter
    from slideredit_rt.assets import choose_world, resolve_base
    from slideredit_rt.engines.manifest import read_manifest
    from slideredit_rt.evaluation.calibrate import CalibrationConfig, calibrate_adapter, draw_calibration
    from slideredit_rt.evaluation.dataset import CALIBRATION_SEEDS
    from slideredit_rt.evaluation.own_images import open_own_images
    from slideredit_rt.evaluation.worlds import EVALUATION
    from slideredit_rt.families import family_of

    if args.destination.exists():
        raise SliderEditError(f"{str(args.destination)!r} exists already; choose another name")
    run, own = run_settings(args), own_image_options(args)
    built = None if args.engine is None else read_manifest(args.engine).base["source"]
    world = EVALUATION[choose_world(args.world, [args.base, args.source, built])]
    base = args.base or world.base
    folder = resolve_base(base)
    family = family_of(folder)
    if own is None:
        dataset = world.dataset(seeds=CALIBRATION_SEEDS)
    else:
        # Calibration measures the response only.
        dataset = open_own_images(dataclasses.replace(own, distance_scorers=()), family, folder)
    adapter, found = calibrate_adapter(
        base,
        load_adapter(args.source, family),
        dataset,
        CalibrationConfig(**options_given(args, "cases", "samples", "steps")),
        engine=args.engine,
        run=run,
        progress=not args.quiet,
    )
    if args.plot is not None:
        draw_calibration(found, args.plot)
    save_adapter(adapter, args.destination)
    curve = found.curve.to_json()
    result = {"out": str(args.destination), "strength_curve": curve, "cases": found.cases, "left_out": found.left_out}
    lines = [f"{'strength':>9} {'alpha':>8}", *(f"{s:>9.3f} {a:>8.3f}" for s, a in zip(*curve.values(), strict=True))]
    counted = f"{found.cases} edits" + (f"; {found.left_out} with too small a response left out" if found.left_out else "")
    emit(args, result, [*lines, f"wrote {args.destination} ({counted})"])
    return 0


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    adapter_commands = commands.group("adapter", "show, convert or calibrate an adapter, or replace the adapter of an engine")
    shown = adapter_commands.add("show", _adapter_show, "describe an adapter and check whether it fits a base")
    shown.add_argument("adapter", metavar="ADAPTER", help="adapter: portraits-st, portraits-gst, a file or a PEFT folder")
    shown.add_argument("--base", help="base to compare with; lists matched, missing and unexpected linears, reads no weights")
    converted = adapter_commands.add("convert", _adapter_convert, "write an adapter in another format")
    converted.add_argument("source", metavar="SRC", help="adapter: portraits-st, portraits-gst, a file or a PEFT folder")
    converted.add_argument(
        "destination", type=user_path, metavar="DST", help="file to write, or a folder for diffusers and peft"
    )
    converted.add_argument(
        "--to",
        choices=("canonical", "diffusers", "peft", "slideredit-st"),
        default="canonical",
        help="format to write (default: %(default)s, one safetensors file with metadata)",
    )
    converted.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the tensors (default: the stored one if it holds all values exactly, else float32)",
    )
    converted.add_argument("--base", help="base to check against; modules that it lacks are an error")
    converted.add_argument(
        "--allow-partial", action="store_true", help="leave out modules that --base lacks instead of failing"
    )
    replacement = adapter_commands.add("replace", _adapter_replace, "replace the adapter of an engine without rebuilding it")
    replacement.add_argument("engine", type=user_path, metavar="ENGINE", help="engine folder to change")
    replacement.add_argument(
        "adapter",
        metavar="ADAPTER",
        nargs="+",
        help="new adapter, with the same kind and modules and at most the same rank; several for a bank",
    )

    calibrated = adapter_commands.add(
        "calibrate", _adapter_calibrate, "fit the map from strength to alpha that evens out the response"
    )
    calibrated.add_argument("source", metavar="SRC", help="adapter: portraits-st, portraits-gst, a file or a PEFT folder")
    calibrated.add_argument("destination", type=user_path, metavar="DST", help="adapter file to write, including the map")
    calibrated.add_argument("--base", help="base to measure on (default: the world's editor, such as portraits-kontext)")
    add_world_option(calibrated, "scenes to edit", follows="the base or adapter")
    calibrated.add_argument("--engine", type=user_path, help="engine with this adapter (default: build one for ONNX Runtime)")
    calibrated.add_argument("--cases", type=int, help="number of edits to measure (default: 32)")
    calibrated.add_argument("--samples", type=int, help="strengths per edit, an odd number (default: 17)")
    calibrated.add_argument("--steps", type=int, help="denoising steps (default: 12)")
    add_run_options(calibrated)
    calibrated.add_argument(
        "--plot", type=user_path, metavar="PNG", help="plot to write: the map, and the response before and after"
    )
    add_own_image_options(calibrated, distances=False)
