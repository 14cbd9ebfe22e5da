"""`slideredit-rt demo`: build the embedded engines, sweep sliders and measure the response."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from slideredit_rt.assets import DEFAULT_WORLD, base_of
from slideredit_rt.editor import SliderEditor
from slideredit_rt.evaluation.dataset import Case, Dataset
from slideredit_rt.evaluation.sweeps import sweep_case
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import Kind
from slideredit_rt.files import atomic_file
from slideredit_rt.images import draw_grid, save_image
from slideredit_rt.sliders import Slider
from slideredit_rt.verify import verify_engine

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
GRID_STRENGTHS = (0.0, 0.5, 1.0, 1.5)
STEPS = 12


@dataclass(frozen=True)
class Demo:
    """Cases of a world that the demo edits.

    Attributes:
        dataset: Scorers of the cases.
        rows: Rows of the strip by kind of adapter: a case and the index of its swept instruction. A GST slider scales the
            whole prompt, so each of its prompts holds one instruction.
        crossed: Case with two instructions, whose sliders are set to every pair of strengths.
    """

    dataset: Dataset
    rows: Mapping[Kind, Sequence[tuple[Case, int]]]
    crossed: Case


def _shapes() -> Demo:
    """Return the demo of a scene with a blue circle and a yellow square, and of a held-out one."""
    from slideredit_rt.evaluation.shapes import ShapesScenes
    from slideredit_rt.shapes.world import Example, Instruction, draw_scene, held_out_examples

    scene = Instruction("square", "yellow").apply(Instruction("circle", "blue").apply(draw_scene(random.Random("demo/5"))))
    generated = Example(scene, (Instruction("circle", "red"), Instruction("background", "dark")))
    examples, scenes = {"generated": generated, "held-out": held_out_examples(8, 2)[7]}, ShapesScenes()
    pairs = {name: scenes.add(name, example) for name, example in examples.items()}
    alone = [
        (scenes.add(f"{name}-{index}", Example(example.scene, (instruction,))), 0)
        for name, example in examples.items()
        for index, instruction in enumerate(example.instructions)
    ]
    return Demo(
        scenes, {"st": [(case, index) for case in pairs.values() for index in range(2)], "gst": alone}, pairs["generated"]
    )


# Instructions and the number of the held-out person whom each edits.
_PORTRAITS = {"make the person smile": 0, "make the hair red": 4, "add glasses": 15, "make the clothes red": 18}


def _portraits() -> Demo:
    """Return the demo of four held-out people, each with an instruction of its own."""
    from slideredit_rt.evaluation.portraits import PortraitsPeople
    from slideredit_rt.portraits.world import find_instruction, held_out_examples

    people = PortraitsPeople()
    rows = []
    for text, number in _PORTRAITS.items():
        example = held_out_examples(number + 1, 1, known=(find_instruction(text),))[number]
        rows.append((people.add(f"person-{number}", example), 0))
    both = held_out_examples(1, 2, known=[find_instruction(text) for text in list(_PORTRAITS)[:2]])[0]
    return Demo(people, {"st": rows[:2], "gst": rows[2:]}, people.add("crossed", both))


DEMOS: dict[str, Callable[[], Demo]] = {"portraits": _portraits, "shapes": _shapes}
"""Demos by world."""


def _to_images(editor: SliderEditor, pixels: Tensor) -> list[Image.Image]:
    processor = editor.pipeline.image_processor
    images: list[Image.Image] = processor.numpy_to_pil(processor.pt_to_numpy(pixels))
    return images


class _Laps:
    """Stopwatch: `end` records the seconds since the previous `end`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    def end(self, name: str) -> None:
        self.seconds[name] = round(time.perf_counter() - self.start, 2)
        self.start = time.perf_counter()


def _sweep(editor: SliderEditor, demo: Demo, case: Case, index: int) -> tuple[dict[str, Any], list[Image.Image]]:
    """Sweep one instruction of a case; return its report entry and its row of the strip."""
    sweep, images = sweep_case(editor, demo.dataset, case, index, STRENGTHS, STEPS)
    entry = {
        "kind": editor.kind,
        "image": case.name,
        "prompt": case.prompt,
        "instruction": sweep.instruction,
        "strengths": list(sweep.strengths),
        "response": [round(r, 4) for r in sweep.response],
        "spearman": round(sweep.spearman, 4),
        "leak": None if sweep.leak is None else round(sweep.leak, 4),
    }
    return entry, [case.image, *_to_images(editor, images)]


def _draw_grid(editor: SliderEditor, case: Case, path: Path) -> None:
    """Save a grid with both sliders of a case at every pair of strengths."""
    rows, columns = case.instructions
    sliders = [Slider(rows), Slider(columns)]
    cells = editor.grid(case.image, sliders, (0, GRID_STRENGTHS), (1, GRID_STRENGTHS), steps=STEPS)
    labels = [f"{s:g}" for s in GRID_STRENGTHS]
    save_image(draw_grid(cells, labels, labels, f"rows: {rows}    columns: {columns}"), path)


def run_demo(out: Path, *, world: str = DEFAULT_WORLD, progress: bool = True) -> dict[str, Any]:
    """Build both engines, sweep their sliders, and write `strip.png`, `grid.png` and `report.json` into `out`.

    Args:
        out: Output folder; created if missing. Files of an earlier demo are replaced.
        world: Embedded world to show, from `DEMOS`.
        progress: Show progress bars on standard error.

    Returns:
        The contents of `report.json`.
    """
    demo = DEMOS[world]()
    laps = _Laps()
    sliders, engines, rows = [], [], []
    out.mkdir(parents=True, exist_ok=True)
    for kind, cases in demo.rows.items():
        path = out / f"engine-{kind}"
        build_engine(base_of(world), f"{world}-{kind}", path, overwrite=True, progress=progress)
        laps.end(f"build {kind}")
        editor = SliderEditor.from_engine(path)
        laps.end(f"load {kind}")
        for case, index in cases:
            entry, row = _sweep(editor, demo, case, index)
            sliders.append(entry)
            rows.append(row)
        laps.end(f"sweep {kind}")
        if kind == "st":
            _draw_grid(editor, demo.crossed, out / "grid.png")
            laps.end("grid")
        verification = verify_engine(path, demo.crossed.image, [Slider(demo.crossed.instructions[0])])
        engines.append({"path": str(path), "backend": "onnxruntime", "max_abs_error": verification.max_abs_error})
        laps.end(f"verify {kind}")
    heads = ["source", *(f"strength {s:g}" for s in STRENGTHS)]
    labels = [f"{entry['kind'].upper()}  {entry['instruction']}" for entry in sliders]
    save_image(draw_grid(rows, heads, labels, "One engine per adapter, every strength at run time", 110), out / "strip.png")
    report = {
        "sliders": sliders,
        "engines": engines,
        "files": [str(out / name) for name in ("strip.png", "grid.png", "report.json")],
        "seconds": laps.seconds | {"total": round(sum(laps.seconds.values()), 2)},
    }
    with atomic_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    return report
