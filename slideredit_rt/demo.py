"""`slideredit-rt demo`: build the embedded engines, move sliders on two scenes, measure what moved."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from slideredit_rt.editor import SliderEditor
from slideredit_rt.export.build import build_engine
from slideredit_rt.files import atomic_file
from slideredit_rt.images import draw_grid, save_image
from slideredit_rt.shapes.sweeps import sweep_example
from slideredit_rt.shapes.world import Example, Instruction, draw_scene, held_out_examples, scene_image
from slideredit_rt.sliders import Slider
from slideredit_rt.verify import verify_engine

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
GRID_STRENGTHS = (0.0, 0.5, 1.0, 1.5)
STEPS = 12


def _generated_example() -> Example:
    """A scene of our own choosing: a blue circle and a yellow square to recolour and to darken around."""
    scene = draw_scene(random.Random("demo/5"))
    instructions = (Instruction("circle", "red"), Instruction("background", "dark"))
    return Example(Instruction("square", "yellow").apply(Instruction("circle", "blue").apply(scene)), instructions)


def _pictures(editor: SliderEditor, images: Tensor) -> list[Image.Image]:
    processor = editor.pipeline.image_processor
    pictures: list[Image.Image] = processor.numpy_to_pil(processor.pt_to_numpy(images))
    return pictures


def run_demo(out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Build both engines, sweep, and write `strip.png`, `grid.png` and `report.json` into `out`.

    Args:
        out: folder; created if missing, its earlier demo files replaced.
        progress: show progress bars on standard error.

    Returns:
        The contents of `report.json`.
    """
    examples = {"generated": _generated_example(), "held-out": held_out_examples(8, 2)[7]}
    seconds: dict[str, float] = {}
    sliders, engines, rows, labels = [], [], [], []
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        seconds[name] = round(time.perf_counter() - start, 2)
        start = time.perf_counter()

    out.mkdir(parents=True, exist_ok=True)
    for kind in ("st", "gst"):
        path = out / f"engine-{kind}"
        build_engine("shapes-kontext", f"shapes-{kind}", path, overwrite=True, progress=progress)
        lap(f"build {kind}")
        editor = SliderEditor.from_engine(path)
        lap(f"load {kind}")
        for where, pair in examples.items():
            for index in range(2):
                # A GST slider scales the whole prompt, so each of its prompts holds one instruction.
                example = pair if kind == "st" else Example(pair.scene, (pair.instructions[index],))
                sweep, images = sweep_example(editor, example, index if kind == "st" else 0, STRENGTHS, STEPS)
                sliders.append(
                    {
                        "kind": kind,
                        "image": where,
                        "prompt": example.prompt,
                        "instruction": sweep.instruction,
                        "strengths": list(sweep.strengths),
                        "response": [round(r, 4) for r in sweep.response],
                        "spearman": round(sweep.spearman, 4),
                        "leak": None if sweep.leak is None else round(sweep.leak, 4),
                    }
                )
                rows.append([scene_image(example), *_pictures(editor, images)])
                labels.append(f"{kind.upper()}  {sweep.instruction}")
        lap(f"sweep {kind}")
        if kind == "st":
            example = examples["generated"]
            texts = [i.text for i in example.instructions]
            cells = editor.grid(
                scene_image(example), [Slider(t) for t in texts], (0, GRID_STRENGTHS), (1, GRID_STRENGTHS), steps=STEPS
            )
            labels_of = [f"{s:g}" for s in GRID_STRENGTHS]
            grid = draw_grid(cells, labels_of, labels_of, f"rows: {texts[0]}    columns: {texts[1]}")
            save_image(grid, out / "grid.png")
            lap("grid")
        verification = verify_engine(
            path, scene_image(examples["generated"]), [Slider(examples["generated"].instructions[0].text)]
        )
        engines.append({"path": str(path), "backend": "onnxruntime", "max_abs_error": verification.max_abs_error})
        lap(f"verify {kind}")
    strip = draw_grid(
        rows,
        ["source", *(f"strength {s:g}" for s in STRENGTHS)],
        labels,
        "One engine per adapter, every strength at run time",
        110,
    )
    save_image(strip, out / "strip.png")
    seconds["total"] = round(sum(seconds.values()), 2)
    report = {
        "sliders": sliders,
        "engines": engines,
        "files": [str(out / name) for name in ("strip.png", "grid.png", "report.json")],
        "seconds": seconds,
    }
    with atomic_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    return report
