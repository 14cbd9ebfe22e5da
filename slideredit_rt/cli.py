"""The command `slideredit-rt`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slideredit_rt.errors import SliderEditError
from slideredit_rt.serving.command import add_options as add_serve_options
from slideredit_rt.sliders import Slider, compose_prompt, normalise

if TYPE_CHECKING:
    from slideredit_rt.engines import Manifest, RuntimeOptions
    from slideredit_rt.evaluation.pictures import PictureOptions
    from slideredit_rt.families import Family
    from slideredit_rt.training.data import Data
    from slideredit_rt.training.trainer import Trainer

_MAX_SWEEP = 64


def _print(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")


def _emit(args: argparse.Namespace, result: dict[str, Any], lines: Sequence[str]) -> None:
    """One JSON object with `--json`, else lines for a person."""
    _print(json.dumps(result) if args.json else "\n".join(lines))


def parse_slider(text: str) -> Slider:
    """`INSTRUCTION=STRENGTH` or `INSTRUCTION` (strength 1)."""
    instruction, separator, value = text.rpartition("=")
    if not separator:
        return Slider(text)
    try:
        return Slider(instruction, float(value))
    except ValueError:
        raise SliderEditError(f"slider {text!r} has the strength {value!r}; write it as 'make the circle red=0.5'") from None


def parse_swept_slider(text: str) -> tuple[Slider, list[float] | None]:
    """`INSTRUCTION=START:STOP:COUNT` for a swept slider, else a fixed one."""
    instruction, _, value = text.rpartition("=")
    if ":" not in value or not instruction:
        return parse_slider(text), None
    try:
        first, last, number = value.split(":")
        start, stop, count = float(first), float(last), int(number)
    except ValueError:
        raise SliderEditError(
            f"slider {text!r} has the range {value!r}; write it as start:stop:count, such as 0:1.5:7"
        ) from None
    if not 2 <= count <= _MAX_SWEEP:
        raise SliderEditError(f"slider {text!r} asks for {count} strengths; give 2 to {_MAX_SWEEP}")
    strengths = [start + (stop - start) * i / (count - 1) for i in range(count)]
    return Slider(instruction, strengths[0]), [Slider(instruction, s).strength for s in strengths]


def _with_members(args: argparse.Namespace, sliders: Sequence[Slider]) -> list[Slider]:
    """The sliders, each with the member of a bank that the `--member` beside it names."""
    if not args.member:
        return list(sliders)
    if len(args.member) != len(sliders):
        raise SliderEditError(
            f"{len(args.member)} --member for {len(sliders)} --slider; name one member for each slider, in the same order"
        )
    return [replace(s, adapter=member) for s, member in zip(sliders, args.member, strict=True)]


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given, by name; the others keep the defaults of what takes them."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _lines(path: Path) -> list[str]:
    """The lines of a text file, without empty ones."""
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SliderEditError(f"{str(path)!r} cannot be read ({error}); give a text file, one edit per line") from None


def _member(slider: Slider) -> dict[str, str]:
    return {} if slider.adapter is None else {"member": slider.adapter}


def _runtime_options(args: argparse.Namespace) -> RuntimeOptions | None:
    """How a TensorRT engine is to be run; None if nothing was asked."""
    from slideredit_rt.engines import RuntimeOptions

    given: dict[str, Any] = {}
    if args.weight_budget_mib is not None:
        given["weight_budget"] = "auto" if args.weight_budget_mib == "auto" else args.weight_budget_mib * 2**20
    if args.cuda_graphs is not None:
        given["cuda_graphs"] = args.cuda_graphs == "on"
    return RuntimeOptions(**given) if given else None


def _edit(args: argparse.Namespace) -> int:
    from slideredit_rt.editor import SliderEditor
    from slideredit_rt.images import open_image, picture_format, save_image

    picture_format(args.out)
    sliders = _with_members(args, [parse_slider(s) for s in args.slider])
    images = [open_image(path) for path in args.image]
    editor = SliderEditor.from_engine(args.engine, args.base, threads=args.threads, options=_runtime_options(args))
    edited = editor.edit(
        images,
        sliders,
        prompt=args.prompt,
        seed=args.seed,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        true_cfg_scale=args.true_cfg_scale,
        negative_prompt=args.negative_prompt,
        progress=not args.quiet,
    )
    save_image(edited, args.out)
    result = {
        "out": str(args.out),
        "prompt": args.prompt or compose_prompt([s.instruction for s in sliders]),
        "sliders": [{"instruction": s.instruction, "strength": s.strength, **_member(s)} for s in sliders],
        "seed": args.seed,
        "size": list(edited.size),
    }
    _emit(args, result, [f"wrote {args.out}"])
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from slideredit_rt.editor import SliderEditor
    from slideredit_rt.files import atomic_file
    from slideredit_rt.images import draw_grid, open_image, picture_format, save_image

    picture_format(args.out)
    parsed = [parse_swept_slider(s) for s in args.slider]
    sliders = _with_members(args, [s for s, _ in parsed])
    swept = [(i, v) for i, (_, v) in enumerate(parsed) if v is not None]
    if len(swept) not in (1, 2):
        raise SliderEditError(f"{len(swept)} sliders are swept; give one (a strip) or two (a grid) as 'instruction=0:1.5:7'")
    images = [open_image(path) for path in args.image]
    editor = SliderEditor.from_engine(args.engine, args.base, threads=args.threads, options=_runtime_options(args))
    options = {
        "prompt": args.prompt,
        "seed": args.seed,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "true_cfg_scale": args.true_cfg_scale,
        "negative_prompt": args.negative_prompt,
        "progress": not args.quiet,
    }
    if len(swept) == 1:
        index, strengths = swept[0]
        cells = [editor.sweep(images, sliders, index, strengths, **options)]
        columns = [f"{s:g}" for s in strengths]
        row_labels = [""]
        title = sliders[index].instruction
    else:
        down, across = swept
        cells = editor.grid(images, sliders, down, across, **options)
        columns = [f"{s:g}" for s in across[1]]
        row_labels = [f"{s:g}" for s in down[1]]
        title = f"rows: {sliders[down[0]].instruction}    columns: {sliders[across[0]].instruction}"
    save_image(draw_grid(cells, columns, row_labels, title), args.out)
    beside = args.out.with_suffix(".json")
    result = {
        "out": str(args.out),
        "prompt": args.prompt or compose_prompt([s.instruction for s in sliders]),
        "sliders": [
            {"instruction": s.instruction, "strengths" if v else "strength": v or s.strength, **_member(s)}
            for s, (_, v) in zip(sliders, parsed, strict=True)
        ],
        "images": args.image,
        "engine": str(args.engine),
        "seed": args.seed,
        "steps": args.steps or editor.family.num_inference_steps,
    }
    with atomic_file(beside) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    _emit(args, result, [f"wrote {args.out} and {beside}"])
    return 0


def _build(args: argparse.Namespace) -> int:
    import dataclasses

    from slideredit_rt.engines.tensorrt import PACKAGES
    from slideredit_rt.export.build import BATCH, MAX_SLIDERS, build_engine
    from slideredit_rt.export.tensorrt_engine import TensorRTOptions

    fields = [f.name for f in dataclasses.fields(TensorRTOptions)]
    given = _given(args, *fields)
    if "targets" in given:
        given["targets"] = tuple(given["targets"])
    if given and args.backend not in PACKAGES:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise SliderEditError(f"{option} is for --backend tensorrt or tensorrt-rtx; the backend {args.backend} takes any size")
    batch = BATCH if args.batch is None else (1, 1, *args.batch) if len(args.batch) == 1 else tuple(args.batch)
    if len(batch) != 3:
        raise SliderEditError(f"--batch takes the largest batch or MIN,OPT,MAX, got {len(batch)} numbers")
    manifest = build_engine(
        args.base,
        args.adapter,
        args.out,
        backend=args.backend,
        lowering=args.lowering,
        dtype=args.dtype,
        batch=batch,
        max_sliders=MAX_SLIDERS if args.max_sliders is None else args.max_sliders,
        allow_partial=args.allow_partial,
        tensorrt=TensorRTOptions(**given) if args.backend in PACKAGES else None,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    ends = ", ".join(f"{count} {name}" for name, count in manifest.updates.items()) or "no sliders"
    _emit(args, {"out": str(args.out), "manifest": manifest.to_json()}, [f"built {args.out} ({manifest.backend}; {ends})"])
    return 0


def _serve(args: argparse.Namespace) -> int:
    from slideredit_rt.serving.command import serve

    return serve(args, _runtime_options(args))


def _inspect(args: argparse.Namespace) -> int:
    from slideredit_rt.engines.manifest import read_manifest
    from slideredit_rt.engines.tensorrt import PACKAGES

    manifest = read_manifest(args.engine)
    adapter, compatibility = manifest.adapter, manifest.compatibility
    later = ", or a later one of the same major" if compatibility.get("versions") else ""
    hardware = compatibility.get("hardware", "none")
    lines = [
        f"engine     {args.engine}",
        f"family     {manifest.family}",
        f"base       {manifest.base['source']}",
        f"adapter    {adapter['source']} ({adapter['kind']}, rank {adapter['rank']}, {adapter['modules']} linears)"
        if adapter
        else "adapter    none",
        *(f"member     {name} ({member['source']})" for name, member in (adapter or {}).get("members", {}).items()),
        f"backend    {manifest.backend} {manifest.backend_version}{later}",
        f"dtype      {manifest.dtype}",
        f"lowering   {manifest.lowering}; updates: {_counts(manifest.updates) or 'none'}",
        f"limits     batch {manifest.max_batch}, sliders {manifest.max_sliders}",
        *([f"targets    {', '.join(manifest.targets)}"] if manifest.targets else []),
        *([f"hardware   {hardware}"] if hardware != "none" else []),
        *(f"profile    {axis} {low} to {high}, usually {usual}" for axis, (low, usual, high) in manifest.ranges.items()),
        *(f"input      {s.name} {s.dtype} [{', '.join(map(str, s.shape))}]" for s in manifest.inputs),
        *(f"output     {s.name} {s.dtype} [{', '.join(map(str, s.shape))}]" for s in manifest.outputs),
        *([f"layers     before fusion: {_counts(manifest.layers)}"] if manifest.layers else []),
        *(f"file       {name} {_mib(info['bytes'])}" for name, info in manifest.files.items()),
        *(f"link       {name} {_mib(info['bytes'])} ({info['kind']})" for name, info in manifest.links.items()),
        f"created    {manifest.created}",
    ]
    result = manifest.to_json()
    if manifest.backend in PACKAGES:
        result["device"], found = _on_device(args.engine, manifest)
        lines += found
    _emit(args, result, lines)
    return 0


def _on_device(folder: Path, manifest: Manifest) -> tuple[dict[str, Any], list[str]]:
    """What only the GPU tells about a compiled engine, as JSON and as lines; without one, why not."""
    from slideredit_rt.engines.tensorrt_report import engine_report

    try:
        report = engine_report(folder, manifest)
    except SliderEditError as error:
        return {"unavailable": str(error)}, [f"device     memory and fused layers need the GPU: {error}"]
    types = _counts(report["layer_types"]) or "of types that the plan does not tell"
    return report, [
        f"device     {_mib(report['weight_bytes'])} of weights, {_mib(report['streamable_weight_bytes'])} of them streamable",
        f"device     {_mib(report['context_bytes'])} for the profile's largest sizes",
        f"layers     after fusion, {report['layers']}: {types}",
    ]


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(numbers.items(), key=lambda item: -item[1]))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _verify(args: argparse.Namespace) -> int:
    from slideredit_rt.images import open_image
    from slideredit_rt.training.shapes_evaluation import scene_image
    from slideredit_rt.training.shapes_world import held_out_examples
    from slideredit_rt.verify import verify_engine

    image = open_image(args.image) if args.image else scene_image(held_out_examples(1, 1)[0])
    sliders = _with_members(args, [parse_slider(s) for s in args.slider or ["make the circle red"]])
    report = verify_engine(args.engine, image, sliders, base=args.base, adapter=args.adapter, options=_runtime_options(args))
    half = report.dtype != "float32"
    lines = [f"{'case':<34} {'max abs':>10} {'rel. RMS':>10}" + (f" {'eager ' + report.dtype:>15}" if half else "")]
    for c in report.comparisons:
        beside = "" if c.same_dtype_rms is None else f" {c.same_dtype_rms:>15.2e}"
        lines.append(f"{c.case:<34} {c.max_abs_error:>10.2e} {c.relative_rms:>10.2e}{beside}")
    lines += [f"final images, {name:<20} PSNR {value:.1f} dB" for name, value in report.psnr.items()]
    lines.append(report.verdict)
    _emit(args, report.to_json(), lines)
    return 0 if report.passed else 1


def _spans(args: argparse.Namespace) -> int:
    from slideredit_rt.assets import resolve_base
    from slideredit_rt.families import family_of
    from slideredit_rt.sliders import find_spans

    folder = resolve_base(args.base)
    family = family_of(folder)
    pipeline = family.load_pipeline(folder, transformer=False)
    sliders = [parse_slider(s) for s in args.slider]
    prompt = normalise(args.prompt) if args.prompt else compose_prompt([s.instruction for s in sliders])
    tokens, rows = family.tokenize(pipeline, prompt), family.max_text_rows(pipeline)
    owners = {row: i for i, span in enumerate(find_spans(prompt, sliders, tokens, rows)) for row in span}
    table = [
        {"row": t.row, "token": t.text, "characters": prompt[t.start : t.end], "slider": owners.get(t.row)} for t in tokens
    ]
    lines = [f"{'row':>4}  {'token':<16} {'characters':<16} slider"]
    for entry, token in zip(table, tokens, strict=True):
        owner = owners.get(token.row)
        name = "" if owner is None else f"{owner}: {sliders[owner].instruction}"
        lines.append(f"{token.row:>4}  {token.text:<16} {entry['characters']!s:<16} {name}".rstrip())
    lines.append(f"{rows} text rows in all; rows without a slider are never scaled by an ST adapter")
    _emit(args, {"prompt": prompt, "text_rows": rows, "tokens": table}, lines)
    return 0


def _adapter_replace(args: argparse.Namespace) -> int:
    from slideredit_rt.export.replace import replace_engine_adapter

    manifest = replace_engine_adapter(args.engine, args.adapter)
    result = {"engine": str(args.engine), "manifest": manifest.to_json()}
    _emit(args, result, [f"{args.engine} now has the adapter {', '.join(args.adapter)}"])
    return 0


def _base_of_adapter(args: argparse.Namespace) -> tuple[Family, Any] | None:
    """The family and the transformer, without its weights, of `--base`."""
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
        f"norm         {report['norm']:.4g} of B·A, all linears together",
        f"fingerprint  {report['fingerprint']}",
        f"training     {', '.join(f'{key} {value}' for key, value in adapter.training.items()) or 'not recorded'}",
        f"{'linears':<52} {'rows':<6} {'count':>5}  {'rank':<8} norm",
    ]
    for name, target in report["targets"].items():
        target_ranks = ",".join(map(str, target["ranks"]))
        lines.append(f"{name:<52} {target['rows'] or '-':<6} {target['modules']:>5}  {target_ranks:<8} {target['norm']:.4g}")
    if base is not None:
        match = dataclasses.asdict(match_adapter(adapter, *base))
        report["base"] = {"source": str(args.base), **match}
        lines.append(f"on {args.base}: " + ", ".join(f"{len(names)} {what}" for what, names in match.items()))
        lines += [f"{what:<12} {name}" for what, names in match.items() if what != "matched" for name in names]
    _emit(args, report, lines)
    return 0


def _adapter_convert(args: argparse.Namespace) -> int:
    from slideredit_rt.adapters import DTYPES, fit_adapter, load_adapter, save_adapter

    if args.allow_partial and args.base is None:
        raise SliderEditError("--allow-partial drops modules that a base lacks; name the base with --base")
    if args.destination.exists():
        raise SliderEditError(f"{str(args.destination)!r} exists already; choose another name")
    base = _base_of_adapter(args)
    loaded = load_adapter(args.source, base and base[0], mixed_dtypes=args.dtype is not None)
    adapter = loaded if base is None else fit_adapter(loaded, *base, allow_partial=args.allow_partial)
    save_adapter(adapter, args.destination, args.to, dtype=args.dtype and DTYPES[args.dtype])
    dropped = [name for name in loaded.pairs if name not in adapter.pairs]
    result = {
        "out": str(args.destination),
        "format": args.to,
        "family": adapter.family,
        "kind": adapter.kind,
        "modules": len(adapter.pairs),
        "dropped": dropped,
    }
    lines = [f"wrote {args.destination} ({args.to}; {adapter.kind}, rank {adapter.rank}, {len(adapter.pairs)} linears)"]
    _emit(args, result, [*lines, *(f"dropped {name}" for name in dropped)])
    return 0


def _adapter_calibrate(args: argparse.Namespace) -> int:
    import dataclasses

    from slideredit_rt.adapters import load_adapter, save_adapter
    from slideredit_rt.assets import resolve_base
    from slideredit_rt.evaluation.calibrate import calibrate_adapter, draw_calibration
    from slideredit_rt.evaluation.dataset import Dataset
    from slideredit_rt.evaluation.pictures import open_pictures
    from slideredit_rt.evaluation.shapes import CALIBRATION_SEEDS, ShapesScenes
    from slideredit_rt.families import family_of

    if args.destination.exists():
        raise SliderEditError(f"{str(args.destination)!r} exists already; choose another name")
    folder = resolve_base(args.base)
    family = family_of(folder)
    own = _picture_options(args)
    if own is None:
        dataset: Dataset = ShapesScenes(seeds=CALIBRATION_SEEDS)
    else:
        # Only a response is read.
        dataset = open_pictures(dataclasses.replace(own, distance_scorers=()), family, folder)
    adapter, found = calibrate_adapter(
        args.base,
        load_adapter(args.source, family),
        dataset,
        engine=args.engine,
        progress=not args.quiet,
        **_given(args, "cases", "samples", "steps", "threads"),
    )
    if args.plot is not None:
        draw_calibration(found, args.plot)
    save_adapter(adapter, args.destination)
    curve = found.curve.to_json()
    result = {"out": str(args.destination), "strength_curve": curve, "cases": found.cases, "left_out": found.left_out}
    lines = [f"{'strength':>9} {'alpha':>8}", *(f"{s:>9.3f} {a:>8.3f}" for s, a in zip(*curve.values(), strict=True))]
    counted = f"{found.cases} edits" + (f", {found.left_out} too small to count" if found.left_out else "")
    _emit(args, result, [*lines, f"wrote {args.destination}, from {counted}"])
    return 0


def _picture_options(args: argparse.Namespace) -> PictureOptions | None:
    """Pictures of one's own, if they were named."""
    from slideredit_rt.evaluation.pictures import PictureOptions

    own = _given(args, "images", "prompts", "attribute_scorers", "distance_scorers")
    if args.scorer_device is not None:
        own["device"] = args.scorer_device
    if args.scorer:
        if odd := [text for text in args.scorer if "=" not in text]:
            raise SliderEditError(f"--scorer {odd[0]!r} names no model; write it as clip=FOLDER")
        own["sources"] = dict(text.split("=", 1) for text in args.scorer)
    if own and not {"images", "prompts"} <= set(own):
        raise SliderEditError("pictures of your own need both --images and --prompts; the scorers are for them")
    return PictureOptions(**own) if own else None


def _demo(args: argparse.Namespace) -> int:
    from slideredit_rt.demo import run_demo

    report = run_demo(args.out, progress=not args.quiet)
    strengths = " ".join(f"{s:5g}" for s in report["sliders"][0]["strengths"])
    lines = [f"{'kind':<4} {'image':<10} {'slider':<26} response at {strengths}  spearman   leak"]
    for s in report["sliders"]:
        curve = " ".join(f"{r:5.2f}" for r in s["response"])
        leak = "" if s["leak"] is None else f"{s['leak']:.3f}"
        lines.append(
            f"{s['kind']:<4} {s['image']:<10} {s['instruction']:<26} {'':<11} {curve}  {s['spearman']:8.3f}  {leak:>5}"
        )
    lines += [f"wrote {', '.join(report['files'])} in {report['seconds']['total']:.0f} s"]
    _emit(args, report, lines)
    return 0


def _train_editor(args: argparse.Namespace) -> int:
    from slideredit_rt.training.shapes_editor import train_shapes_editor

    report = train_shapes_editor(args.out, args.vae_steps, args.decoder_steps, args.editor_steps)
    lines = [
        f"{k}: {v['mse']:.5f}, unedited {v['mse_unedited']:.5f}, ratio {v['ratio']:.4f}"
        for k, v in report.items()
        if isinstance(v, dict)
    ]
    _emit(args, {"out": str(args.out), **report}, [*lines, f"wrote {args.out}"])
    return 0


def _frozen_base(args: argparse.Namespace) -> tuple[Family, Any]:
    """The family and the pipeline that a trainer works on."""
    import torch

    from slideredit_rt.assets import resolve_base
    from slideredit_rt.families import family_of

    folder = resolve_base(args.base)
    family = family_of(folder)
    return family, family.load_pipeline(folder, dtype=getattr(torch, args.dtype))


def _training_data(args: argparse.Namespace, side: int, shapes: type[Data]) -> Data:
    """Pictures of `--images` with the edits of `--instructions`, else shapes scenes."""
    from slideredit_rt.training.data import FolderData
    from slideredit_rt.training.shapes_world import find_instruction

    edits = None if args.instructions is None else _lines(args.instructions)
    if args.images is None:
        return shapes() if edits is None else shapes([find_instruction(edit) for edit in edits])  # type: ignore[call-arg]
    if edits is None:
        raise SliderEditError("training on a folder of images needs --instructions, a text file with one edit per line")
    images = sorted(p for p in args.images.iterdir() if p.is_file()) if args.images.is_dir() else []
    return FolderData(images, edits, side)


def _train(args: argparse.Namespace, trainer: Trainer[Any]) -> Any:
    """Run to the end; returns what was trained."""
    sample_every = max(1, trainer.settings.steps // 4) if args.sample_every is None else args.sample_every
    return trainer.train(progress=not args.quiet, sample_every=sample_every, snapshots=args.snapshots)


def _train_adapter(args: argparse.Namespace) -> int:
    import dataclasses

    from slideredit_rt.training.shapes_adapters import ShapesData, shapes_recipe
    from slideredit_rt.training.suppression import SuppressionConfig, SuppressionTrainer

    family, pipeline = _frozen_base(args)
    data = _training_data(args, family.side(pipeline), ShapesData)
    target = "remaining" if args.kind == "st" else "neutral"
    recipe = shapes_recipe(args.kind) if args.images is None else SuppressionConfig(kind=args.kind, target=target)  # type: ignore[arg-type]
    config = dataclasses.replace(recipe, **_given(args, *(f.name for f in dataclasses.fields(SuppressionConfig))))
    adapter = _train(args, SuppressionTrainer(family, pipeline, data, config, args.out))
    _emit(args, {"out": str(args.out), "modules": len(adapter.pairs), **adapter.training}, [f"wrote {args.out}"])
    return 0


def _train_concepts(args: argparse.Namespace) -> int:
    from slideredit_rt.training.concepts import ConceptConfig, ConceptTrainer
    from slideredit_rt.training.shapes_adapters import concepts_recipe

    return _train_contrast(args, ConceptTrainer, ConceptConfig, concepts_recipe())


def _train_offsets(args: argparse.Namespace) -> int:
    from slideredit_rt.training.attribute_offsets import OffsetConfig, OffsetTrainer
    from slideredit_rt.training.shapes_adapters import offsets_recipe

    return _train_contrast(args, OffsetTrainer, OffsetConfig, offsets_recipe())


def _train_contrast(args: argparse.Namespace, trainer: Any, settings: Any, recipe: Any) -> int:
    """A trainer of one slider per instruction, by its own settings, or on shapes scenes by the shipped recipe."""
    import dataclasses

    from slideredit_rt.training.shapes_adapters import BalancedShapes

    family, pipeline = _frozen_base(args)
    data = _training_data(args, family.side(pipeline), BalancedShapes)
    given = _given(args, *(f.name for f in dataclasses.fields(settings) if f.name != "attributes"))
    if args.instructions is not None:
        given["attributes"] = tuple(_lines(args.instructions))
    config = dataclasses.replace(recipe, **given) if args.images is None else settings(**given)
    trained = _train(args, trainer(family, pipeline, data, config, args.out))
    _emit(args, {"out": str(args.out), **trained.training}, [f"wrote {args.out}: {len(config.attributes)} attributes"])
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_argument("--debug", action="store_true", help="show a traceback when something fails")

    parser = argparse.ArgumentParser(
        prog="slideredit-rt", description="One compiled engine, every slider: inference for SliderEdit."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, to: Any = commands) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = to.add_parser(name, parents=[common], help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def runtime_options(sub: argparse.ArgumentParser) -> None:
        tensorrt = sub.add_argument_group("for engines of --backend tensorrt-rtx and tensorrt")
        tensorrt.add_argument(
            "--weight-budget-mib",
            type=_budget,
            metavar="N|auto",
            help="weights to keep on the GPU, the rest is streamed (default: all)",
        )
        tensorrt.add_argument("--cuda-graphs", choices=("on", "off"), help="replay captured graphs (default: on)")

    def member_option(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--member",
            action="append",
            metavar="NAME",
            help="adapter that a slider scales, in an engine of several; one per --slider, in the same order",
        )

    def image_options(sub: argparse.ArgumentParser, example: str) -> None:
        sub.add_argument("engine", type=Path, metavar="ENGINE", help="folder written by slideredit-rt build")
        sub.add_argument(
            "--image", action="append", required=True, help="picture to edit; repeat for a base that takes several"
        )
        sub.add_argument("--slider", action="append", required=True, metavar=example, help="repeat for several sliders")
        member_option(sub)
        sub.add_argument("--prompt", help="holds every instruction; default: the instructions joined by ' and '")
        sub.add_argument("--seed", type=int, default=0, help="of the initial noise (default: 0)")
        sub.add_argument("--steps", type=int, help="denoising steps (default: the family's)")
        sub.add_argument("--guidance-scale", type=float, help="embedded guidance (default: the family's)")
        sub.add_argument("--true-cfg-scale", type=float, help="guidance with a negative pass (default: the family's; 1: none)")
        sub.add_argument("--negative-prompt", help="of the negative pass (default: the family's)")
        sub.add_argument("--base", help="where the base checkpoint is, if not where the manifest says")
        sub.add_argument("--threads", type=int, help="CPU threads of the backend")
        runtime_options(sub)
        sub.add_argument("--out", type=Path, required=True, help="picture to write")

    def picture_options(sub: argparse.ArgumentParser, *, distances: bool) -> None:
        own = sub.add_argument_group("on pictures of your own instead of shapes scenes")
        own.add_argument("--images", type=Path, metavar="DIR", help="pictures to edit")
        own.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines: {"instructions": […], "attributes": […]}')
        own.add_argument("--attribute-scorers", type=_listed(str), help="of clip, siglip, blip-itm (default: clip,siglip)")
        if distances:
            own.add_argument(
                "--distance-scorers",
                type=_listed(str),
                help="of lpips-alex, lpips-vgg, dinov2, arcface (default: lpips-alex,dinov2)",
            )
        else:
            sub.set_defaults(distance_scorers=None)
        own.add_argument(
            "--scorer", action="append", default=[], metavar="NAME=SOURCE", help="where a scorer's model is; repeat"
        )
        own.add_argument("--scorer-device", help="of the scorers' models (default: cpu)")

    image_options(command("edit", _edit, "edit a picture at given strengths"), "INSTRUCTION=STRENGTH")
    image_options(
        command("sweep", _sweep, "move one or two sliders and draw a strip or a grid"), "INSTRUCTION=START:STOP:COUNT"
    )

    build = command("build", _build, "build an engine from a checkpoint and an adapter")
    build.add_argument("--base", required=True, help="shapes-kontext, a diffusers folder or a hub repository")
    build.add_argument(
        "--adapter",
        action="append",
        help="shapes-st, shapes-gst, a file or a PEFT folder; repeat for a bank, whose adapters have strengths of their own; "
        "without it the frozen backbone is exported",
    )
    build.add_argument("--out", type=Path, required=True, help="engine folder to create")
    build.add_argument("--backend", default="onnxruntime", help="onnxruntime (default), inductor, tensorrt-rtx or tensorrt")
    build.add_argument(
        "--lowering",
        default="auto",
        metavar="{auto,native,folded,plugin}",
        help="how the masked update is expressed (default: folded for GST, native for ST)",
    )
    build.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of weights and arithmetic (default: the checkpoint's; float32 for onnxruntime)",
    )
    build.add_argument("--batch", type=_listed(int), metavar="MAX or MIN,OPT,MAX", help="batch sizes (default: 1,1,16)")
    build.add_argument("--max-sliders", type=int, help="most sliders in one prompt (default: 8)")
    compiled = build.add_argument_group("for --backend tensorrt-rtx and tensorrt")
    compiled.add_argument("--resolution", type=int, help="usual width and height in pixels (default: 1024)")
    compiled.add_argument("--max-text-rows", type=int, help="most text rows of a prompt (default: 512, Qwen 1536)")
    compiled.add_argument("--optimization-level", type=int, choices=range(6), help="the builder's (default: its own)")
    compiled.add_argument("--workspace-mib", type=int, help="limit of the builder's scratch memory on the device")
    compiled.add_argument("--weight-streaming", action="store_const", const=True, help="let the runtime stream weights")
    compiled.add_argument(
        "--targets", type=_listed(str), help="compute capabilities, tensorrt-rtx only (default: sm86,sm89,sm120)"
    )
    compiled.add_argument(
        "--version-compatible", action="store_const", const=True, help="later versions run the engine, tensorrt only"
    )
    compiled.add_argument(
        "--hardware-compatibility",
        choices=("ampere_plus", "same_compute_capability"),
        help="other cards run the engine, tensorrt only (default: none)",
    )
    compiled.add_argument("--timing-cache", type=Path, help="file to read and write the builder's timings, tensorrt only")
    build.add_argument(
        "--allow-partial",
        action="store_true",
        help="leave out modules of the adapter that the base lacks instead of refusing it",
    )
    build.add_argument("--overwrite", action="store_true", help="replace an existing folder")

    command("inspect", _inspect, "print what an engine is").add_argument("engine", type=Path, metavar="ENGINE")

    serve = command("serve", _serve, "serve edits over HTTP, with a page")
    add_serve_options(serve)
    runtime_options(serve)

    verify = command("verify", _verify, "compare an engine with the eager reference")
    verify.add_argument("engine", type=Path, metavar="ENGINE")
    verify.add_argument("--image", help="a real picture (default: a generated scene)")
    verify.add_argument("--slider", action="append", metavar="INSTRUCTION", help="(default: 'make the circle red')")
    member_option(verify)
    verify.add_argument("--base", help="where the base checkpoint is, if not where the manifest says")
    verify.add_argument(
        "--adapter", action="append", help="where the adapter is, if not where the manifest says; repeat for a bank"
    )
    runtime_options(verify)

    adapter_commands = commands.add_parser(
        "adapter", help="show or convert an adapter, or change that of an engine"
    ).add_subparsers(dest="what", required=True, metavar="WHAT")
    shown = command("show", _adapter_show, "print what an adapter is, and how it fits a base", adapter_commands)
    shown.add_argument("adapter", metavar="ADAPTER", help="shapes-st, shapes-gst, a file or a PEFT folder")
    shown.add_argument("--base", help="report which linears match, are missing or unexpected; its weights are not read")
    converted = command("convert", _adapter_convert, "write an adapter in another format", adapter_commands)
    converted.add_argument("source", metavar="SRC", help="shapes-st, shapes-gst, a file or a PEFT folder")
    converted.add_argument("destination", type=Path, metavar="DST", help="file to write; a folder for diffusers and peft")
    converted.add_argument(
        "--to",
        choices=("canonical", "diffusers", "peft", "slideredit-st"),
        default="canonical",
        help="canonical: one safetensors file with metadata (default)",
    )
    converted.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the tensors (default: as they are stored, if that holds them exactly, else float32)",
    )
    converted.add_argument("--base", help="refuse an adapter with modules that this base lacks")
    converted.add_argument("--allow-partial", action="store_true", help="with --base: leave these modules out instead")
    replacement = command("replace", _adapter_replace, "give an engine another adapter without a build", adapter_commands)
    replacement.add_argument("engine", type=Path, metavar="ENGINE")
    replacement.add_argument(
        "adapter",
        metavar="ADAPTER",
        nargs="+",
        help="of the same kind and modules, of the same rank or a lower one; several for a bank",
    )

    calibrated = command(
        "calibrate", _adapter_calibrate, "learn the map from strength to alpha that makes a response even", adapter_commands
    )
    calibrated.add_argument("source", metavar="SRC", help="shapes-st, shapes-gst, a file or a PEFT folder")
    calibrated.add_argument("destination", type=Path, metavar="DST", help="adapter file to write, with the map in it")
    calibrated.add_argument("--base", default="shapes-kontext", help="(default: shapes-kontext)")
    calibrated.add_argument("--engine", type=Path, help="built with this adapter (default: one is built for ONNX Runtime)")
    calibrated.add_argument("--cases", type=int, help="edits to measure (default: 32)")
    calibrated.add_argument("--samples", type=int, help="strengths per edit, odd (default: 17)")
    calibrated.add_argument("--steps", type=int, help="denoising steps (default: 12)")
    calibrated.add_argument("--threads", type=int, help="CPU threads of the engine")
    calibrated.add_argument("--plot", type=Path, metavar="PNG", help="draw the response before and after, and the map")
    picture_options(calibrated, distances=False)

    spans = command("spans", _spans, "print the tokens of a prompt, their rows and which slider owns them")
    spans.add_argument("--base", default="shapes-kontext", help="whose tokenizer (default: shapes-kontext)")
    spans.add_argument("--slider", action="append", required=True, metavar="INSTRUCTION")
    spans.add_argument("--prompt", help="default: the instructions joined by ' and '")

    command("demo", _demo, "build the embedded engines, move sliders, measure what moved").add_argument(
        "--out", type=Path, required=True, help="folder for engines, pictures and the report"
    )

    evaluate = command("evaluate", _evaluate, "compare sliders with other ways to scale an edit")
    evaluate.add_argument("--base", help="(default: that of the first engine, else shapes-kontext)")
    evaluate.add_argument("--adapter", action="append", default=[], help="shapes-st, shapes-gst, a file or a folder; repeat")
    evaluate.add_argument("--engine", type=Path, action="append", default=[], help="folder written by build; repeat")
    evaluate.add_argument(
        "--systems",
        type=_listed(str),
        default=[],
        help="of st, gst, pad-interpolation, implicit-cfg, explicit-cfg, merged-lora, concept-sliders, attribute-offsets "
        "(default: all that can be)",
    )
    evaluate.add_argument("--concepts", help="bank of concept sliders (default: shapes-concepts, on its own base and scenes)")
    evaluate.add_argument("--offsets", help="attribute offsets (default: shapes-offsets, on their own base and scenes)")
    evaluate.add_argument("--sliders", type=_listed(int), default="1", help="moved jointly: 1, 2, 3 (default: 1)")
    evaluate.add_argument(
        "--scenes", type=_listed(int), default="64", help="cases for each number of sliders, or for all (default: 64)"
    )
    evaluate.add_argument("--samples", type=int, help="settings of one slider (default: 15)")
    evaluate.add_argument("--joint-samples", type=int, help="settings per slider of several (default: 7)")
    evaluate.add_argument("--search-scenes", type=int, help="for choosing each system's range (default: 12)")
    evaluate.add_argument("--steps", type=int, help="denoising steps (default: 12)")
    evaluate.add_argument("--threads", type=int, help="CPU threads of the engines")
    evaluate.add_argument("--instructions", type=Path, help="instructions of the shapes scenes, one per line (default: all)")
    picture_options(evaluate, distances=True)
    evaluate.add_argument("--out", type=Path, required=True, help="folder of the run; a killed run continues in it")

    kernel_commands = commands.add_parser("kernels", help="compile the Triton kernels ahead of time").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    kernels = command("build", _kernels_build, "write PTX and launch descriptions; needs no GPU", kernel_commands)
    kernels.add_argument(
        "--targets",
        type=_listed(str),
        default="sm80,sm86,sm89,sm90,sm100,sm120",
        help="compute capabilities, comma-separated (default: %(default)s)",
    )
    kernels.add_argument("--dtypes", type=_listed(str), default="bfloat16,float16", help="(default: %(default)s)")
    kernels.add_argument("--ranks", type=_listed(int), default="16", help="1 to 128, padded (default: %(default)s)")
    kernels.add_argument("--ptx-isa", default="8.7", help="PTX version; newer ones need newer drivers (default: %(default)s)")
    kernels.add_argument("--processes", type=int, help="(default: one per core)")
    kernels.add_argument("--out", type=Path, required=True, help="folder to write; what is up to date stays")
    listing = command("list", _kernels_list, "show the kernels of a folder and what they use", kernel_commands)
    listing.add_argument("folder", type=Path, metavar="DIR")

    train = commands.add_parser("train", help="train an editor, an adapter, or a rival's sliders")
    kinds = train.add_subparsers(dest="what", required=True, metavar="WHAT")
    editor = command("shapes-editor", _train_editor, "reproduce the embedded editor, shapes-kontext", kinds)
    editor.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    editor.add_argument("--vae-steps", type=int, default=1600)
    editor.add_argument("--decoder-steps", type=int, default=800)
    editor.add_argument("--editor-steps", type=int, default=2800)

    def training_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--base", default="shapes-kontext", help="shapes-kontext, a diffusers folder or a hub repository")
        sub.add_argument(
            "--images", type=Path, help="folder of source pictures (default: shapes scenes and the shipped recipe)"
        )
        sub.add_argument("--instructions", type=Path, help="text file, one edit per line (default: all of the shapes world)")
        sub.add_argument("--timestep-sampling", choices=("uniform", "logit-normal"))
        sub.add_argument("--steps", type=int)
        sub.add_argument("--batch", type=int)
        sub.add_argument("--learning-rate", type=float)
        sub.add_argument("--schedule", choices=("constant", "cosine"))
        sub.add_argument("--seed", type=int)
        sub.add_argument("--gradient-checkpointing", action="store_const", const=True, help="less memory, more time")
        sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen base")
        sub.add_argument(
            "--sample-every", type=int, help="steps between sample pictures (default: a quarter of the run; 0: none)"
        )
        sub.add_argument(
            "--snapshots", type=_listed(int), default=[], metavar="STEP,…", help="keep what is trained after these steps, too"
        )
        sub.add_argument("--out", type=Path, required=True, help="file to write (.safetensors)")

    adapter = command("adapter", _train_adapter, "train an ST or GST adapter by partial prompt suppression", kinds)
    training_options(adapter)
    adapter.add_argument("--kind", choices=("st", "gst"), required=True)
    adapter.add_argument("--target", choices=("remaining", "empty", "neutral"), help="prompt of the frozen model")
    adapter.add_argument(
        "--alpha-sampling", choices=("uniform", "fixed"), help="fixed is the paper's loss; uniform makes a ramp"
    )
    adapter.add_argument("--rank", type=int)
    adapter.add_argument(
        "--all-projections",
        action="store_const",
        const=True,
        help="adapt every linear whose rows the kind may scale (default: those of the released adapters)",
    )

    concepts = command("concepts", _train_concepts, "train Concept Sliders, a bank with one LoRA per instruction", kinds)
    training_options(concepts)
    concepts.add_argument("--rank", type=int, help="of each member")
    concepts.add_argument("--eta", type=float, help="steps from the neutral prompt to the instruction that a target goes")

    offsets = command("offsets", _train_offsets, "train an embedding offset per instruction", kinds)
    training_options(offsets)
    offsets.add_argument("--noun", help="words of the base's neutral prompt that get the offset (default: image)")
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    from slideredit_rt.engines.manifest import read_manifest
    from slideredit_rt.evaluation.command import Given, run_evaluation
    from slideredit_rt.evaluation.report import markdown_table
    from slideredit_rt.evaluation.run import BenchmarkConfig

    config = BenchmarkConfig(
        sliders=tuple(args.sliders),
        scenes=tuple(args.scenes),
        **_given(args, "samples", "joint_samples", "search_scenes", "steps"),
    )
    base = args.base or (read_manifest(args.engine[0]).base["source"] if args.engine else "shapes-kontext")
    report = run_evaluation(
        Given(base, args.adapter, args.engine, args.systems, args.concepts, args.offsets),
        config,
        args.out,
        pictures=_picture_options(args),
        instructions=args.instructions and _lines(args.instructions),
        progress=not args.quiet,
    )
    files = ", ".join(("report.json", "table.md", "rows.csv", *report["pictures"]))
    _emit(args, report, [markdown_table(report["systems"]), f"wrote {args.out}: {files}"])
    return 0


def _kernels_build(args: argparse.Namespace) -> int:
    from slideredit_rt.kernels import aot

    work = aot.jobs(args.targets, args.dtypes, args.ranks, args.ptx_isa)
    compiled, kept = aot.build(work, args.out, processes=args.processes, progress=not args.quiet)
    result = {"out": str(args.out), "compiled": compiled, "up_to_date": kept}
    _emit(args, result, [f"{args.out}: {compiled} kernels compiled, {kept} were up to date"])
    return 0


def _kernels_list(args: argparse.Namespace) -> int:
    from slideredit_rt.kernels import aot

    found = aot.built(args.folder)
    columns = ("target", "registers", "spill_bytes", "shared_bytes", "num_warps", "ptx_isa")
    width = max(len(k["file"]) for k in found)
    lines = [f"{'file':{width}}  " + "  ".join(columns)]
    lines += [f"{k['file']:{width}}  " + "  ".join(f"{k[c]!s:>{len(c)}}" for c in columns) for k in found]
    _emit(args, {"kernels": found}, lines)
    return 0


def _listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Comma-separated values."""

    def parse(text: str) -> list[Any]:
        return [convert(part.strip()) for part in text.split(",") if part.strip()]

    return parse


def _budget(text: str) -> int | str:
    """A number of MiB, or `auto`."""
    if text == "auto" or text.isdecimal():
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of MiB nor 'auto'")


def _silence_libraries() -> None:
    """Third-party notices about things that nobody here uses hide our own one sentence."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def _terminate(signum: int, frame: Any) -> None:
    # Lets clean-up run, so that a stopped build leaves nothing behind.
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 1 when a verification fails, 2 for bad input, 130 when interrupted."""
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
