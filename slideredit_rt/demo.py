"""`slideredit-rt demo`: build the embedded engines, sweep sliders over two scenes and measure the response."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from slideredit_rt.editor import SliderEditor
from slideredit_rt.evaluation.shapes import ShapesScenes
from slideredit_rt.evaluation.sweeps import sweep_case
from slideredit_rt.export.build import build_engine
from slideredit_rt.files import atomic_file
from slideredit_rt.images import draw_grid, save_image
from slideredit_rt.shapes.world import Example, Instruction, draw_scene, held_out_examples, scene_image
from slideredit_rt.sliders import Slider
from slideredit_rt.verify import verify_engine

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
GRID_STRENGTHS = (0.0, 0.5, 1.0, 1.5)
STEPS = 12


def _generated_example() -> Example:
    """Return a scene with a blue circle and a yellow square, and two edits: a red circle and a dark background."""
    scene = draw_scene(random.Random("demo/5"))
    instructions = (Instruction("circle", "red"), Instruction("background", "dark"))
    return Example(Instruction("square", "yellow").apply(Instruction("circle", "blue").apply(scene)), instructions)


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


def _sweep(editor: SliderEditor, where: str, pair: Example, index: int) -> tuple[dict[str, Any], list[Image.Image]]:
    """Sweep one instruction of a scene; return its report entry and its row of the strip."""
    # A GST slider scales the whole prompt, so each of its prompts holds one instruction.
    alone = editor.kind == "gst"
    example = Example(pair.scene, (pair.instructions[index],)) if alone else pair
    scenes = ShapesScenes()
    case = scenes.add(where, example)
    sweep, images = sweep_case(editor, scenes, case, 0 if alone else index, STRENGTHS, STEPS)
    entry = {
        "kind": editor.kind,
        "image": where,
        "prompt": example.prompt,
        "instruction": sweep.instruction,
        "strengths": list(sweep.strengths),
        "response": [round(r, 4) for r in sweep.response],
        "spearman": round(sweep.spearman, 4),
        "leak": None if sweep.leak is None else round(sweep.leak, 4),
    }
    return entry, [case.image, *_to_images(editor, images)]


def _draw_grid(editor: SliderEditor, example: Example, path: Path) -> None:
    """Save a grid with both sliders of an example at every pair of strengths."""
    rows, columns = (i.text for i in example.instructions)
    sliders = [Slider(rows), Slider(columns)]
    cells = editor.grid(scene_image(example), sliders, (0, GRID_STRENGTHS), (1, GRID_STRENGTHS), steps=STEPS)
    labels = [f"{s:g}" for s in GRID_STRENGTHS]
    save_image(draw_grid(cells, labels, labels, f"rows: {rows}    columns: {columns}"), path)


def run_demo(out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Build both engines, sweep their sliders, and write `strip.png`, `grid.png` and `report.json` into `out`.

    Args:
        out: Output folder; created if missing. Files of an earlier demo are replaced.
        progress: Show progress bars on standard error.

    Returns:
        The contents of `report.json`.
    """
    generated = _generated_example()
    examples = {"generated": generated, "held-out": held_out_examples(8, 2)[7]}
    laps = _Laps()
    sliders, engines, rows = [], [], []
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("st", "gst"):
        path = out / f"engine-{kind}"
        build_engine("shapes-kontext", f"shapes-{kind}", path, overwrite=True, progress=progress)
        laps.end(f"build {kind}")
        editor = SliderEditor.from_engine(path)
        laps.end(f"load {kind}")
        for where, pair in examples.items():
            for index in range(2):
                entry, row = _sweep(editor, where, pair, index)
                sliders.append(entry)
                rows.append(row)
        laps.end(f"sweep {kind}")
        if kind == "st":
            _draw_grid(editor, generated, out / "grid.png")
            laps.end("grid")
        verification = verify_engine(path, scene_image(generated), [Slider(generated.instructions[0].text)])
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
