"""Measure edits in few steps with a few-step LoRA and write `results/few_step_marks.json` (`make few-step-marks`).

Eager torch, on held-out scenes. Errors are means over images in units of [0, 1] pixels, squared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slideredit_rt.adapters import Fused
from slideredit_rt.bench.results import Mark, verdicts
from slideredit_rt.editor import SliderEditor
from slideredit_rt.evaluation.sweeps import evaluate_sliders, table
from slideredit_rt.files import atomic_file, user_path
from slideredit_rt.shapes.world import Example, held_out_examples, render, scene_image

RESULTS = Path(__file__).parent / "results" / "few_step_marks.json"
BASE, MANY, COUNTS = "shapes-kontext", 28, (1, 2)


def open_editor(kind: str, lora: str | None) -> SliderEditor:
    """Open the embedded editor with its adapter of a kind, and with a LoRA fused."""
    return SliderEditor.from_pretrained(BASE, f"shapes-{kind}", fuse=[] if lora is None else [Fused(lora)])


def edits(editor: SliderEditor, examples: Sequence[Example], steps: int) -> Tensor:
    """Edit each example at strength 1 with its own seed; return float32 `[N, 3, H, W]` in [0, 1]."""
    images = []
    for seed, example in enumerate(examples):
        texts = [instruction.text for instruction in example.instructions]
        prepared = editor.prepare(scene_image(example), texts, prompt=example.prompt, seed=seed)
        images.append(editor.render_tensor(prepared, [[1.0] * len(texts)], steps=steps))
    return torch.cat(images)


def measure_edits(lora: str, few: int, scenes: int) -> dict[str, Any]:
    """Compare edits in many steps with edits in few, with and without the LoRA, on `scenes` scenes per number of edits."""
    plain, fused = open_editor("st", None), open_editor("st", lora)
    examples = [example for count in COUNTS for example in held_out_examples(scenes, count)]
    exact, many = render(example.target for example in examples), edits(plain, examples, MANY)
    columns = {f"{MANY} steps": many, f"{few} steps": edits(plain, examples, few)}
    columns[f"{few} steps with the LoRA"] = edits(fused, examples, few)
    return {
        name: {
            "error_to_exact_edit": (images - exact).square().mean().item(),
            f"error_to_{MANY}_steps": (images - many).square().mean().item(),
        }
        for name, images in columns.items()
    }


def measure_sliders(lora: str, few: int, scenes: int) -> dict[str, dict[str, Any]]:
    """Sweep the sliders of both adapters in few steps, with and without the LoRA."""
    rows: dict[str, dict[str, Any]] = {}
    for name, fuse in ((f"{few} steps", None), (f"{few} steps with the LoRA", lora)):
        for kind, counts in (("st", COUNTS), ("gst", (1,))):
            editor = open_editor(kind, fuse)
            for count in counts:
                rows[f"{kind}, {count} instruction(s), {name}"] = table(evaluate_sliders(editor, count, scenes, few))
    return rows


def marks_of(few: int, errors: dict[str, Any], sliders: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the marks of a measurement with their verdicts."""
    column = f"{few} steps with the LoRA"
    ratio = errors[column]["error_to_exact_edit"] / errors[f"{MANY} steps"]["error_to_exact_edit"]
    found = [Mark(f"squared error to the exact edit, {column} / {MANY} steps", ratio, "<=", 1.5)]
    for name, row in sliders.items():
        if not name.endswith(column):
            continue
        if row["median_leak"] is not None:
            found.append(Mark(f"{name}: median leak", row["median_leak"], "<=", 0.1))
            continue
        found.append(Mark(f"{name}: erased below a quarter", row["erased_below_quarter"], ">=", 0.9))
        found.append(Mark(f"{name}: Spearman at least .95", row["spearman_at_least_0.95"], ">=", 0.9))
        found.append(Mark(f"{name}: distance from linear", row["linearity"], "<=", 0.12))
    return verdicts(found, timed=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lora", default="shapes-turbo", help="few-step LoRA (default: %(default)s)")
    parser.add_argument("--few-steps", type=int, default=4, help="steps of an edit with it (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=64, help="scenes per row (default: %(default)s)")
    parser.add_argument("--out", type=user_path, default=RESULTS, help="file to write (default: %(default)s)")
    args = parser.parse_args(arguments)
    errors = measure_edits(args.lora, args.few_steps, args.scenes)
    sliders = measure_sliders(args.lora, args.few_steps, args.scenes)
    result = {
        "command": f"make few-step-marks BENCH_OPTIONS='--few-steps {args.few_steps} --scenes {args.scenes}'",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "edits": errors,
        "sliders": sliders,
        "marks": marks_of(args.few_steps, errors, sliders),
    }
    text = json.dumps(result, indent=2) + "\n"
    with atomic_file(args.out) as temporary:
        temporary.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
