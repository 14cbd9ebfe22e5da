"""`slideredit-rt edit`, `sweep`, `spans` and `demo`."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import TYPE_CHECKING

from slideredit_rt.assets import DEFAULT_WORLD, base_of, from_anywhere
from slideredit_rt.commands.shared import (
    Commands,
    add_member_option,
    add_run_options,
    add_world_option,
    emit,
    run_settings,
    with_members,
)
from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import atomic_file, check_engine_folder, user_path
from slideredit_rt.settings import EditSettings
from slideredit_rt.sliders import Slider, compose_prompt
from slideredit_rt.spans import normalise, stands_in
from slideredit_rt.strength import StrengthSchedule, check_strength, linear_sweep, strength_json

_MAX_SWEEP = 64

if TYPE_CHECKING:
    from slideredit_rt.editor import SliderEditor


def _is_instruction(text: str, prompt: str | None) -> bool:
    """Return whether all of a slider's text, `=` included, is an instruction: the given prompt contains it."""
    return prompt is not None and stands_in(normalise(prompt), normalise(text).strip())


def parse_slider(text: str, prompt: str | None = None) -> Slider:
    """Parse `INSTRUCTION=STRENGTH`, or `INSTRUCTION` with strength 1. The strength may be a schedule, as in `0@0,1@0.3`.

    A text that `prompt` contains as a whole is an instruction, even with `=` in it.
    """
    instruction, separator, value = text.rpartition("=")
    if not separator or _is_instruction(text, prompt):
        return Slider(text)
    if "@" in value:
        return Slider(instruction, StrengthSchedule.parse(value))
    try:
        return Slider(instruction, float(value))
    except ValueError:
        raise SliderEditError(
            f"slider {text!r} has strength {value!r}, not a number; write it as 'make the hair red=0.5'"
        ) from None


def parse_swept_slider(text: str, prompt: str | None = None) -> tuple[Slider, list[float] | None]:
    """Parse `INSTRUCTION=START:STOP:COUNT` as a swept slider, anything else as `parse_slider` does.

    Returns:
        The slider, and its strengths if it is swept.
    """
    instruction, _, value = text.rpartition("=")
    if ":" not in value or not instruction or _is_instruction(text, prompt):
        return parse_slider(text, prompt), None
    try:
        first, last, number = value.split(":")
        start, stop, count = float(first), float(last), int(number)
    except ValueError:
        raise SliderEditError(f"slider {text!r} has range {value!r}; write it as start:stop:count, such as 0:1.5:7") from None
    if not 2 <= count <= _MAX_SWEEP:
        raise SliderEditError(f"slider {text!r} is swept over {count} strengths; give 2 to {_MAX_SWEEP}")
    strengths = linear_sweep(start, stop, count)
    slider = Slider(instruction, strengths[0])
    for strength in strengths:
        check_strength(slider.instruction, strength)
    return slider, strengths


def member_of(slider: Slider) -> dict[str, str]:
    return {} if slider.adapter is None else {"member": slider.adapter}


def edit_settings(args: argparse.Namespace) -> EditSettings:
    """Return the settings from the options of `edit` and `sweep`."""
    return EditSettings(**{field.name: getattr(args, field.name) for field in fields(EditSettings)})


def _open(args: argparse.Namespace) -> SliderEditor:
    check_engine_folder(args.engine)
    run = run_settings(args)

    from slideredit_rt.editor import SliderEditor

    editor = SliderEditor.from_engine(args.engine, args.base, run)
    return editor if args.adapter is None else editor.use_adapter(args.adapter)


def _adapter_of(args: argparse.Namespace) -> str | None:
    """Return where the adapter of `--adapter` is found from any folder; None for the engine's own."""
    return None if args.adapter is None else from_anywhere(args.adapter)


def _edit(args: argparse.Namespace) -> int:
    settings = edit_settings(args)
    sliders = with_members(args, [parse_slider(s, args.prompt) for s in args.slider])

    from slideredit_rt.images import check_output, open_image, save_image

    check_output(args.out)
    images = [open_image(path) for path in args.image]
    editor = _open(args)
    check_output(args.out, editor.edited_size(images))
    edited = editor.edit(images, sliders, settings, progress=not args.quiet)
    save_image(edited, args.out)
    result = {
        "out": str(args.out),
        "prompt": args.prompt or compose_prompt([s.instruction for s in sliders]),
        "sliders": [{"instruction": s.instruction, "strength": strength_json(s.strength), **member_of(s)} for s in sliders],
        "adapter": _adapter_of(args),
        "seed": args.seed,
        "frozen_steps": editor.frozen_steps(settings),
        "size": list(edited.size),
    }
    emit(args, result, [f"wrote {args.out}"])
    return 0


def _sweep(args: argparse.Namespace) -> int:
    settings = edit_settings(args)
    parsed = [parse_swept_slider(s, args.prompt) for s in args.slider]
    sliders = with_members(args, [s for s, _ in parsed])
    swept = [(i, v) for i, (_, v) in enumerate(parsed) if v is not None]
    if len(swept) not in (1, 2):
        raise SliderEditError(f"{len(swept)} sliders are swept; sweep one (a strip) or two (a grid), as 'instruction=0:1.5:7'")

    from slideredit_rt.images import check_output, draw_grid, grid_size, open_image, save_image

    check_output(args.out)
    images = [open_image(path) for path in args.image]
    editor = _open(args)
    *rest, across = swept
    columns, row_labels, title = [f"{s:g}" for s in across[1]], [""], sliders[across[0]].instruction
    for index, down in rest:
        row_labels = [f"{s:g}" for s in down]
        title = f"rows: {sliders[index].instruction}    columns: {title}"
    check_output(args.out, grid_size(editor.edited_size(images), len(columns), row_labels, title))
    if rest:
        cells = editor.grid(images, sliders, rest[0], across, settings, progress=not args.quiet)
    else:
        cells = [editor.sweep(images, sliders, *across, settings, progress=not args.quiet)]
    save_image(draw_grid(cells, columns, row_labels, title), args.out)
    beside = args.out.with_suffix(".json")
    result = {
        "out": str(args.out),
        "prompt": args.prompt or compose_prompt([s.instruction for s in sliders]),
        "sliders": [
            {"instruction": s.instruction, "strengths" if v else "strength": v or strength_json(s.strength), **member_of(s)}
            for s, (_, v) in zip(sliders, parsed, strict=True)
        ],
        "images": [str(path) for path in args.image],
        "engine": str(args.engine),
        "adapter": _adapter_of(args),
        "seed": args.seed,
        "steps": editor.number_of_steps(settings),
        "frozen_steps": editor.frozen_steps(settings),
    }
    with atomic_file(beside) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    emit(args, result, [f"wrote {args.out} and {beside}"])
    return 0


def _spans(args: argparse.Namespace) -> int:
    from slideredit_rt.assets import resolve_base
    from slideredit_rt.families import family_of
    from slideredit_rt.spans import find_spans

    folder = resolve_base(args.base)
    family = family_of(folder)
    pipeline = family.load_pipeline(folder, transformer=False)
    sliders = [parse_slider(s, args.prompt) for s in args.slider]
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
    emit(args, {"prompt": prompt, "text_rows": rows, "tokens": table}, lines)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from slideredit_rt.demo import run_demo

    report = run_demo(args.out, world=args.world, progress=not args.quiet)
    strengths = " ".join(f"{s:5g}" for s in report["sliders"][0]["strengths"])
    leaks = any(s["leak"] is not None for s in report["sliders"])
    lines = [f"{'kind':<4} {'image':<12} {'slider':<26} response at {strengths}  spearman{'   leak' if leaks else ''}"]
    for s in report["sliders"]:
        curve = " ".join(f"{r:5.2f}" for r in s["response"])
        leak = "" if s["leak"] is None else f"{s['leak']:.3f}"
        lines.append(
            f"{s['kind']:<4} {s['image']:<12} {s['instruction']:<26} {'':<11} {curve}  {s['spearman']:8.3f}  {leak:>5}".rstrip()
        )
    lines += [f"wrote {', '.join(report['files'])} in {report['seconds']['total']:.0f} s"]
    emit(args, report, lines)
    return 0


def _add_image_options(sub: argparse.ArgumentParser, example: str, text: str) -> None:
    """Add the options that `edit` and `sweep` share."""
    sub.add_argument("engine", type=user_path, metavar="ENGINE", help="engine folder, written by slideredit-rt build")
    sub.add_argument(
        "--image", type=user_path, action="append", required=True, help="image to edit; repeatable if the base takes several"
    )
    sub.add_argument("--slider", action="append", required=True, metavar=example, help=text)
    add_member_option(sub)
    sub.add_argument("--adapter", help="adapter for an engine with adapter inputs (default: the engine's own)")
    sub.add_argument(
        "--prompt", help="whole prompt, with every instruction in it (default: the instructions joined by ' and ')"
    )
    sub.add_argument("--seed", type=int, default=EditSettings.seed, help="seed of the initial noise (default: %(default)s)")
    sub.add_argument("--steps", type=int, help="denoising steps (default: the engine's)")
    sub.add_argument("--guidance-scale", type=float, help="scale of the embedded guidance (default: the engine's)")
    sub.add_argument(
        "--true-cfg-scale", type=float, help="scale of guidance with a negative pass (default: the engine's; 1: no pass)"
    )
    sub.add_argument("--negative-prompt", help="prompt of the negative pass (default: the family's)")
    sub.add_argument(
        "--slider-start",
        type=float,
        metavar="FRACTION",
        help="fraction of the steps before the sliders act, in [0, 1); all strengths of a sweep share these steps "
        "(default: the engine's, usually 0)",
    )
    sub.add_argument("--base", help="base checkpoint (default: the location in the manifest)")
    add_run_options(sub)
    sub.add_argument("--out", type=user_path, required=True, help="image file to write")


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    _add_image_options(
        commands.add("edit", _edit, "edit an image at given strengths"),
        "INSTRUCTION=STRENGTH",
        "instruction and its strength, 1 if left out, or a schedule STRENGTH@FRACTION,… over the run, such as 0@0,1@0.3; "
        "repeatable",
    )
    _add_image_options(
        commands.add("sweep", _sweep, "sweep one or two sliders and draw a strip or a grid"),
        "INSTRUCTION=START:STOP:COUNT",
        "instruction and the range to sweep, or INSTRUCTION=STRENGTH for a fixed slider, as in edit; repeatable",
    )

    spans = commands.add("spans", _spans, "print the tokens of a prompt, their rows and the slider that owns each")
    spans.add_argument("--base", default=base_of(DEFAULT_WORLD), help="base whose tokenizer is used (default: %(default)s)")
    spans.add_argument(
        "--slider", action="append", required=True, metavar="INSTRUCTION", help="instruction to find; repeatable"
    )
    spans.add_argument("--prompt", help="whole prompt (default: the instructions joined by ' and ')")

    demo = commands.add("demo", _demo, "build the embedded engines, sweep sliders and measure the response")
    add_world_option(demo, "editor")
    demo.add_argument("--out", type=user_path, required=True, help="folder for engines, images and the report")
