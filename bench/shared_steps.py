"""Effect of `slider_start`: `python -m slideredit_rt.bench.shared_steps` writes `results/shared_steps.json`.

It measures the quality of the sliders at several starts (see `slideredit_rt.evaluation.sweeps`), the time of a sweep, and the
steps of a dragged slider in a service. Times are compared within a round, because a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slideredit_rt.editor import SliderEditor
from slideredit_rt.evaluation.sweeps import SliderSweep, evaluate_sliders, table
from slideredit_rt.export.build import build_engine
from slideredit_rt.serving.requests import EditRequest
from slideredit_rt.serving.service import EditService
from slideredit_rt.settings import EditSettings, RunSettings
from slideredit_rt.shapes.world import held_out_examples, scene_image
from slideredit_rt.sliders import Slider
from slideredit_rt.strength import linear_sweep

RESULTS = Path(__file__).parent / "results" / "shared_steps.json"
STARTS = (0.0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8)
STEPS = 12
POSITIONS = 10
_SWEPT = tuple(linear_sweep(0.0, 1.5, 7))
_MARKS = {1 / 4: 0.82, 1 / 2: 0.62}
"""Largest time of a sweep of 7 strengths with a start, as a share of the plain sweep's."""


def quality(sweeps: list[SliderSweep]) -> dict[str, float | None]:
    """Return the marks of some sweeps, and their mean response at strength 0 and at the largest strength."""
    ends = {f"response at {s:g}": i for i, s in enumerate(sweeps[0].strengths) if s in (0.0, max(sweeps[0].strengths))}
    responses = {name: statistics.fmean(sweep.response[i] for sweep in sweeps) for name, i in ends.items()}
    return responses | table(sweeps)


def seconds(work: Callable[[], object]) -> float:
    """Return the time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def time_sweeps(editor: SliderEditor, rounds: int) -> dict[str, Any]:
    """Time a sweep of 7 strengths with several starts in turn; return the ratios to the plain sweep within each round."""
    example = held_out_examples(1, 1)[0]
    image, sliders = scene_image(example), [Slider(example.instructions[0].text)]
    found: dict[float, list[float]] = {start: [] for start in (0.0, *_MARKS)}
    for number in range(rounds + 1):
        for start, times in found.items():
            taken = seconds(lambda s=start: editor.sweep(image, sliders, 0, _SWEPT, steps=STEPS, slider_start=s))  # type: ignore[misc]
            if number:  # the first round plans for every shape
                times.append(taken)
    return {
        f"{start:g}": {
            "ratio": statistics.median(a / b for a, b in zip(found[start], found[0.0], strict=True)),
            "mark": mark,
            "by_round": [a / b for a, b in zip(found[start], found[0.0], strict=True)],
        }
        for start, mark in _MARKS.items()
    }


def drag(editor: SliderEditor, rounds: int) -> dict[str, Any]:
    """Drag a slider back and forth in a service; return the engine steps and the times of both passes."""
    example = held_out_examples(1, 1)[0]
    image, sliders = scene_image(example), (Slider(example.instructions[0].text),)
    positions, ratios = linear_sweep(0.0, 1.5, POSITIONS), []
    with EditService(editor) as service:

        def edit(strength: float, seed: int) -> int:
            """Edit, and return the steps that it took."""
            before = sum(service.stats().batch_sizes.values())
            settings = EditSettings(seed=seed, steps=STEPS, slider_start=1 / 2)
            service.submit(EditRequest(image, sliders, ((strength,),), settings)).future.result()
            return sum(service.stats().batch_sizes.values()) - before

        edit(1.0, rounds)  # encodes the image and the prompt
        for seed in range(rounds):
            steps: list[list[int]] = [[], []]
            there = seconds(lambda s=seed, n=steps: n[0].extend(edit(p, s) for p in positions))  # type: ignore[misc]
            back = seconds(lambda s=seed, n=steps: n[1].extend(edit(p, s) for p in reversed(positions)))  # type: ignore[misc]
            ratios.append(back / there)
        stats = service.stats()
    return {
        "steps of each edit, there and back": steps,
        "moved over first": {"ratio": max(steps[0][1:]) / steps[0][0], "mark": 0.5},
        "back over there, time": {"ratio": statistics.median(ratios), "mark": 0.15, "by_round": ratios},
        "cache": {"hits": stats.cache_hits, "misses": stats.cache_misses, "bytes": stats.cache_bytes_by_kind},
    }


def measure(scenes: int, rounds: int, threads: int | None) -> dict[str, Any]:
    """Measure on embedded ONNX Runtime engines.

    Args:
        scenes: Held-out scenes for each kind and number of instructions.
        rounds: Rounds of the times.
        threads: CPU threads of the engines; None leaves the choice to ONNX Runtime.
    """
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        editors = {}
        for kind in ("st", "gst"):
            build_engine("shapes-kontext", f"shapes-{kind}", Path(folder) / kind)
            editors[kind] = SliderEditor.from_engine(Path(folder) / kind, run=RunSettings(threads=threads))
        times = {"sweep of 7": time_sweeps(editors["st"], rounds), "drag": drag(editors["st"], rounds)}
        for kind, editor in editors.items():
            for count in (1, 2) if kind == "st" else (1,):
                rows[f"{kind}, {count} instruction(s)"] = {
                    f"{start:g}": quality(evaluate_sliders(editor, count, scenes, STEPS, slider_start=start))
                    for start in STARTS
                }
    return {
        "command": f"python -m slideredit_rt.bench.shared_steps --scenes {scenes} --rounds {rounds}"
        + ("" if threads is None else f" --threads {threads}"),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "diffusers")},
        "steps": STEPS,
        **times,
        "sliders": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=32, help="scenes for each kind (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the times (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of the engines (default: ONNX Runtime's choice)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(default: %(default)s)")
    args = parser.parse_args()
    result = json.dumps(measure(args.scenes, args.rounds, args.threads), indent=2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(result + "\n")
    sys.stdout.write(result + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
