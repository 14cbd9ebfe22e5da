"""`slideredit-rt build`, `inspect` and `verify`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slideredit_rt.commands.edit import parse_slider
from slideredit_rt.commands.shared import (
    Commands,
    add_fuse_option,
    add_member_option,
    add_run_options,
    counts,
    emit,
    listed,
    mib,
    options_given,
    parse_fused,
    run_settings,
    with_members,
)
from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import check_engine_folder, user_path
from slideredit_rt.settings import EditDefaults

if TYPE_CHECKING:
    from slideredit_rt.engines import Backend, Manifest


def _build(args: argparse.Namespace) -> int:
    from slideredit_rt.engines import BuildSettings, get_backend
    from slideredit_rt.export.build import build_engine

    given = options_given(args, "dtype", "max_sliders", "max_rank", "kind")
    if args.batch is not None:
        given["batch"] = (1, 1, *args.batch) if len(args.batch) == 1 else tuple(args.batch)
        if len(given["batch"]) != 3:
            raise SliderEditError(f"--batch has {len(args.batch)} numbers; give the largest batch, or MIN,OPT,MAX")
    settings = BuildSettings(
        backend=args.backend,
        lowering=args.lowering,
        allow_partial=args.allow_partial,
        copy_weights=args.copy_weights,
        options=_build_options(args, get_backend(args.backend)),
        fuse=tuple(parse_fused(text) for text in args.fuse),
        defaults=_edit_defaults(args),
        adapter_inputs=args.adapter_inputs,
        **given,
    )
    manifest = build_engine(args.base, args.adapter, args.out, settings, overwrite=args.overwrite, progress=not args.quiet)
    ends = ", ".join(f"{count} {name}" for name, count in manifest.updates.items()) or "no sliders"
    lines = [f"built {args.out} ({manifest.backend}; {ends})", *_fused_lines(manifest)]
    emit(args, {"out": str(args.out), "manifest": manifest.to_json()}, lines)
    return 0


def _edit_defaults(args: argparse.Namespace) -> EditDefaults:
    """Return the defaults of edits, as given on the command line."""
    names = ("default_steps", "default_guidance_scale", "default_true_cfg_scale", "timestep_shift", "default_slider_start")
    given = options_given(args, *names)
    return EditDefaults(**{name.removeprefix("default_"): value for name, value in given.items()})


def _fused_lines(manifest: Manifest) -> list[str]:
    """Describe the LoRAs in an engine's weights."""
    return [f"fused      {m['source']} (scale {m['scale']:g}, {m['modules']} linears)" for m in manifest.fused]


def _profile_lines(title: str, ranges: Mapping[str, Sequence[int]]) -> list[str]:
    """Describe the sizes that a plan was compiled for."""
    return [f"{title:<10} {axis} {low} to {high}, usually {usual}" for axis, (low, usual, high) in ranges.items()]


def _adapter_input_lines(manifest: Manifest) -> list[str]:
    """Describe which adapters an engine with adapter inputs takes."""
    if (layout := manifest.layout) is None:
        return []
    return [f"takes      any {layout.kind} adapter of rank {layout.max_rank} at most, for {len(layout.modules)} linears"]


def _build_options(args: argparse.Namespace, backend: Backend) -> Any:
    """Return the build options of this backend alone, as given on the command line; None if there are none."""
    import dataclasses

    from slideredit_rt.engines import BACKENDS

    kinds = {name: {f.name for f in dataclasses.fields(b.build_options)} for name, b in BACKENDS.items() if b.build_options}
    given = options_given(args, *(name for name in sorted(set().union(*kinds.values())) if hasattr(args, name)))
    if foreign := sorted(given.keys() - kinds.get(backend.name, set())):
        others = " or ".join(name for name, fields in kinds.items() if foreign[0] in fields)
        raise SliderEditError(f"--{foreign[0].replace('_', '-')} is for --backend {others}; leave it out with {backend.name}")
    if backend.build_options is None or not given:
        return None
    return backend.build_options(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def _inspect(args: argparse.Namespace) -> int:
    _check_estimate(args)
    if (args.engine / "model_index.json").exists():
        return _inspect_base(args)
    check_engine_folder(args.engine)
    from slideredit_rt.engines import BACKENDS
    from slideredit_rt.engines.manifest import read_manifest

    manifest = read_manifest(args.engine)
    adapter, compatibility = manifest.adapter, manifest.compatibility
    later = " or a later version of the same major" if compatibility.get("versions") else ""
    hardware = compatibility.get("hardware", "none")
    lines = [
        f"engine     {args.engine}",
        f"family     {manifest.family}",
        f"base       {manifest.base['source']}",
        f"adapter    {adapter['source']} ({adapter['kind']}, rank {adapter['rank']}, {adapter['modules']} linears)"
        if adapter
        else "adapter    none",
        *(_adapter_input_lines(manifest)),
        *(
            f"member     {name} ({manifest.member_kinds[name]}, {member['source']})"
            for name, member in (adapter or {}).get("members", {}).items()
        ),
        *_fused_lines(manifest),
        f"backend    {manifest.backend} {manifest.backend_version}{later}",
        f"dtype      {manifest.dtype}",
        *([f"precision  {manifest.precision}; linears: {counts(manifest.quantised)}"] if manifest.precision else []),
        f"lowering   {manifest.lowering}; updates: {counts(manifest.updates) or 'none'}",
        f"limits     batch {manifest.max_batch}, sliders {manifest.max_sliders}",
        *(f"default    {name} {value:g}" for name, value in manifest.defaults.items()),
        *([f"targets    {', '.join(manifest.targets)}"] if manifest.targets else []),
        *([f"hardware   {hardware}"] if hardware != "none" else []),
        *_profile_lines("profile", manifest.ranges),
        *_profile_lines("reading", manifest.reading_ranges),
        *(f"input      {s.name} {s.dtype} [{', '.join(map(str, s.shape))}]" for s in manifest.inputs),
        *(f"output     {s.name} {s.dtype} [{', '.join(map(str, s.shape))}]" for s in manifest.outputs),
        *([f"layers     before fusion: {counts(manifest.layers)}"] if manifest.layers else []),
        *([f"gemms      after fusion: {counts(manifest.plan['gemms'])}"] if manifest.plan else []),
        *(f"weights    {dtype} {mib(size)}" for dtype, size in manifest.plan.get("weights", {}).items()),
        *(f"file       {name} {mib(info['bytes'])}" for name, info in manifest.files.items()),
        *(f"link       {name} {mib(info['bytes'])} ({info['kind']})" for name, info in manifest.links.items()),
        f"created    {manifest.created}",
    ]
    result = manifest.to_json()
    if args.vram is not None:
        result["memory"], more = _memory(args, manifest)
        lines += more
    if backend := BACKENDS.get(manifest.backend):
        try:
            if device := backend.report(args.engine, manifest):
                result["device"] = device
                lines += _device_lines(device)
        except SliderEditError as error:
            result["device"] = {"unavailable": str(error)}
            lines.append(f"device     memory and fused layers are known only where the engine can run: {error}")
    emit(args, result, lines)
    return 0


def _inspect_base(args: argparse.Namespace) -> int:
    """Describe a base: its family, and how the linears of its transformer are stored."""
    from slideredit_rt.quantization.describe import describe_base

    if args.vram is not None:
        raise SliderEditError(f"{str(args.engine)!r} is a base, and --vram is for engines; build one first")
    report = describe_base(args.engine)
    lines = [
        f"base       {args.engine}",
        f"family     {report['family']}",
        f"precision  {report['precision'] or 'not quantised'}",
        *([f"layers     {counts(report['layers'])}; {report['kept']} linears kept"] if report["layers"] else []),
        *(f"stored     {dtype} {mib(size)}" for dtype, size in report["stored"].items()),
    ]
    emit(args, {"base": str(args.engine), **report}, lines)
    return 0


def _check_estimate(args: argparse.Namespace) -> None:
    """Refuse options of a server without the card that they are estimated for."""
    if args.vram is None and (unused := options_given(args, "adapters_mib", "cache_mib", "preview_decoder")):
        option = next(iter(unused)).replace("_", "-")
        raise SliderEditError(f"--{option} belongs to the estimate of --vram; pass --vram as well, or leave it out")


def _memory(args: argparse.Namespace, manifest: Manifest) -> tuple[dict[str, Any], list[str]]:
    """Estimate what fits on a card of `--vram` GiB."""
    from dataclasses import asdict

    from slideredit_rt.assets import resolve_base
    from slideredit_rt.memory import DEPLOYED, ServerParts, engine_footprint, plan_memory
    from slideredit_rt.preview_decoder import decoder_folder

    if args.adapters_mib is not None and manifest.layout is None:
        raise SliderEditError(f"{str(args.engine)!r} contains its adapter; leave --adapters-mib out")
    base = resolve_base(args.base or manifest.base["source"])
    server = ServerParts(
        adapters=None if args.adapters_mib is None else args.adapters_mib * 2**20,
        preview_decoder=None if args.preview_decoder is None else decoder_folder(args.preview_decoder),
        cache=(args.cache_mib or 0) * 2**20,
    )
    plan = plan_memory(engine_footprint(args.engine, manifest, base, DEPLOYED, server), int(args.vram * 2**30))
    verdict = f"fits, batch {plan.max_batch} at most," if plan.fits else "does not fit, not even"
    how = {
        "none": "with everything on the card",
        "encoders": "with --offload encoders",
        "all": f"with --offload all, which streams all but {plan.weights_gib:g} GiB of the weights",
    }[plan.offload]
    if not plan.fits:
        how += f"; {plan.missing_gib:g} GiB are missing"
    return asdict(plan), [
        f"memory     {plan.vram_gib:g} GiB: {verdict} {how}",
        f"memory     weights {plan.weights_gib:g}, encoders {plan.encoders_gib:g}, autoencoder {plan.decoder_gib:g}, "
        f"activations {plan.activations_gib:g} GiB (batch 1); 1.5 GiB are reserved",
        *(
            [f"memory     keys and values {plan.keys_values_gib:g} GiB for each source image, also in the server's cache"]
            if plan.keys_values_gib
            else []
        ),
        *([f"memory     adapter inputs {plan.adapters_gib:g} GiB"] if plan.adapters_gib else []),
        *(
            [f"memory     preview decoder {plan.preview_decoder_gib:g}, cache {plan.cache_gib:g} GiB"]
            if args.preview_decoder is not None or args.cache_mib
            else []
        ),
    ]


def _device_lines(report: dict[str, Any]) -> list[str]:
    """Format what only the device can report about a compiled engine."""
    types = counts(report["layer_types"]) or "types not recorded in the plan"
    return [
        f"device     {mib(report['weight_bytes'])} of weights, {mib(report['streamable_weight_bytes'])} of them streamable",
        f"device     {mib(report['context_bytes'])} of working memory at the profile's largest sizes",
        f"layers     after fusion, {report['layers']}: {types}",
    ]


def _card_size(text: str) -> float:
    """Parse a number of GiB above 0."""
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not the memory of a card in GiB; give a number such as 24")
    return size


def _whole_mib(text: str) -> int:
    """Parse a whole number of MiB from 0."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of MiB; give a whole number such as 256")
    return int(text)


def _verify(args: argparse.Namespace) -> int:
    check_engine_folder(args.engine)
    from slideredit_rt.assets import resolve_base
    from slideredit_rt.engines.manifest import read_manifest
    from slideredit_rt.images import open_image
    from slideredit_rt.samples import sample_of
    from slideredit_rt.verify import Origins, verify_engine

    sample = sample_of(resolve_base(args.base or read_manifest(args.engine).base["source"]))
    image = open_image(args.image) if args.image else sample.open()
    sliders = with_members(args, [parse_slider(s) for s in args.slider or sample.instructions[:1]])
    report = verify_engine(
        args.engine,
        image,
        sliders,
        Origins(args.base, args.adapter, args.reference, args.fuse),
        run=run_settings(args),
    )
    half = report.dtype != "float32" and report.precision is None
    lines = [f"{'case':<34} {'max abs':>10} {'rel. RMS':>10}" + (f" {'eager ' + report.dtype:>15}" if half else "")]
    for c in report.comparisons:
        beside = "" if c.same_dtype_rms is None else f" {c.same_dtype_rms:>15.2e}"
        lines.append(f"{c.case:<34} {c.max_abs_error:>10.2e} {c.relative_rms:>10.2e}{beside}")
    lines += [f"final images, {name:<20} PSNR {value:.1f} dB" for name, value in report.psnr.items()]
    lines.append(report.verdict)
    emit(args, report.to_json(), lines)
    return 0 if report.passed else 1


def _add_build(commands: Commands) -> None:
    build = commands.add("build", _build, "build an engine from a checkpoint and an adapter")
    build.add_argument("--base", required=True, help="base: portraits-kontext, a diffusers folder or a hub repository")
    build.add_argument(
        "--adapter",
        action="append",
        help="adapter: a name such as portraits-st, a file or a PEFT folder; repeatable, for a bank with a strength per "
        "adapter (default: none, the frozen backbone)",
    )
    build.add_argument("--out", type=user_path, required=True, help="engine folder to create")
    build.add_argument(
        "--backend",
        default="onnxruntime",
        help="execution backend: inductor, onnxruntime, tensorrt or tensorrt-rtx (default: %(default)s)",
    )
    build.add_argument(
        "--lowering",
        default="auto",
        metavar="{auto,native,folded,plugin,operator}",
        help="form of the masked update in the graph (default: folded for GST, native for ST; operator for inductor)",
    )
    build.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of weights and arithmetic (default: the checkpoint's; float32 for onnxruntime)",
    )
    build.add_argument("--batch", type=listed(int), metavar="MAX or MIN,OPT,MAX", help="accepted batch sizes (default: 1,1,16)")
    build.add_argument("--max-sliders", type=int, help="most sliders in one prompt (default: 8)")
    build.add_argument(
        "--allow-partial",
        action="store_true",
        help="leave out modules of the adapter that the base lacks instead of failing",
    )
    build.add_argument(
        "--copy-weights",
        action="store_true",
        help="copy the base's weights instead of linking them, so that the base can be changed or deleted",
    )
    build.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    add_fuse_option(build)
    _add_adapter_inputs(build)
    _add_edit_defaults(build)
    _add_compiler_options(build)


def _add_adapter_inputs(build: argparse.ArgumentParser) -> None:
    """Add the options of engines that take their adapter as inputs."""
    inputs = build.add_argument_group("one engine for any adapter")
    inputs.add_argument(
        "--adapter-inputs",
        action="store_true",
        help="make A and B inputs of the engine, which then runs any adapter; --adapter gives the default one",
    )
    inputs.add_argument("--max-rank", type=int, metavar="R", help="largest rank (default: that of --adapter, or 16)")
    inputs.add_argument("--kind", choices=("st", "gst"), help="kind of the adapters, without --adapter (default: st)")


def _add_edit_defaults(build: argparse.ArgumentParser) -> None:
    """Add the options that `_edit_defaults` reads."""
    usual = build.add_argument_group("defaults of edits with the engine, for example those of a LoRA for fewer steps")
    usual.add_argument("--default-steps", type=int, metavar="N", help="denoising steps (default: the family's)")
    usual.add_argument(
        "--default-guidance-scale", type=float, metavar="SCALE", help="scale of the embedded guidance (default: the family's)"
    )
    usual.add_argument(
        "--default-true-cfg-scale",
        type=float,
        metavar="SCALE",
        help="scale of guidance with a negative pass (default: the family's; 1: no pass)",
    )
    usual.add_argument(
        "--timestep-shift",
        type=float,
        metavar="SHIFT",
        help="fixed shift of the noise levels, for any image size (default: the base's scheduler as it is)",
    )
    usual.add_argument(
        "--default-slider-start",
        type=float,
        metavar="FRACTION",
        help="fraction of the steps before the sliders act, in [0, 1) (default: 0)",
    )


def _add_compiler_options(build: argparse.ArgumentParser) -> None:
    compiled = build.add_argument_group("options of --backend tensorrt and tensorrt-rtx")
    compiled.add_argument("--resolution", type=int, help="usual width and height, in pixels (default: 1024)")
    compiled.add_argument("--max-text-rows", type=int, help="most text rows of a prompt (default: 512; 1536 for Qwen)")
    compiled.add_argument(
        "--optimization-level",
        type=int,
        choices=range(6),
        help="optimization level of the builder (default: the builder's own)",
    )
    compiled.add_argument(
        "--workspace-mib",
        type=int,
        help="limit of the builder's scratch memory on the device, in MiB (default: the builder's own)",
    )
    compiled.add_argument(
        "--weight-streaming", action="store_const", const=True, help="allow streaming weights from host memory"
    )
    compiled.add_argument(
        "--targets", type=listed(str), help="compute capabilities; tensorrt-rtx only (default: sm86,sm89,sm120)"
    )
    compiled.add_argument(
        "--version-compatible",
        action="store_const",
        const=True,
        help="let later versions of the same major run the engine; tensorrt only",
    )
    compiled.add_argument(
        "--hardware-compatibility",
        choices=("ampere_plus", "same_compute_capability"),
        help="other GPUs that may run the engine; tensorrt only (default: none)",
    )
    compiled.add_argument("--timing-cache", type=user_path, help="file in which the builder keeps its timings; tensorrt only")


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    _add_build(commands)
    inspect = commands.add("inspect", _inspect, "describe an engine or a base")
    inspect.add_argument(
        "engine", type=user_path, metavar="ENGINE", help="engine folder, written by slideredit-rt build, or base folder"
    )
    inspect.add_argument(
        "--vram", type=_card_size, metavar="GIB", help="estimate whether edits fit on a card of this size; needs no GPU"
    )
    inspect.add_argument("--base", help="base checkpoint, for --vram (default: the location in the manifest)")
    inspect.add_argument(
        "--adapters-mib",
        type=_whole_mib,
        metavar="N",
        help="device memory for the adapters of a server, in MiB, for --vram (default: the adapter in use only)",
    )
    inspect.add_argument(
        "--cache-mib",
        type=_whole_mib,
        metavar="N",
        help="cache of a server, in MiB, for --vram (default: none)",
    )
    inspect.add_argument(
        "--preview-decoder",
        metavar="FOLDER",
        help="tiny autoencoder of a server, or its hub repository, for --vram (default: none)",
    )

    verify = commands.add("verify", _verify, "compare an engine with the eager reference")
    verify.add_argument("engine", type=user_path, metavar="ENGINE", help="engine folder, written by slideredit-rt build")
    verify.add_argument("--image", type=user_path, help="image to edit (default: one that the page edits)")
    verify.add_argument(
        "--slider", action="append", metavar="INSTRUCTION", help="instruction; repeatable (default: one for that image)"
    )
    add_member_option(verify)
    verify.add_argument("--base", help="base checkpoint (default: the location in the manifest)")
    verify.add_argument(
        "--adapter",
        action="append",
        help="adapter (default: the location in the manifest); repeatable, for a bank; any for an engine with adapter inputs",
    )
    verify.add_argument(
        "--fuse",
        action="append",
        metavar="LORA",
        help="fused LoRA, in the order of the build (default: the locations in the manifest); repeatable",
    )
    verify.add_argument(
        "--reference", help="unquantised base, for a quantised engine (default: the one that its base was quantised from)"
    )
    add_run_options(verify)
