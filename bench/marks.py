"""Measure an embedded editor and its adapters on held-out scenes and write `results/portraits_marks.json` (`make marks`).

`--base FOLDER --st FILE --gst FILE` measures an editor that does not ship, and `--world shapes` the one of the tests.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from slideredit_rt.assets import DEFAULT_WORLD, WORLDS, resolve_base
from slideredit_rt.bench.results import Mark, verdicts
from slideredit_rt.editor import SliderEditor
from slideredit_rt.evaluation.dataset import MARKS_SEEDS
from slideredit_rt.evaluation.portraits import PortraitsPeople
from slideredit_rt.evaluation.sweeps import STRENGTHS, SliderSweep, evaluate_sliders, linearity_by_instruction, summarise, table
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import family_of
from slideredit_rt.files import atomic_file, user_path
from slideredit_rt.portraits.editor_recipe import evaluate_editor as evaluate_portraits
from slideredit_rt.portraits.world import render
from slideredit_rt.shapes.editor_recipe import evaluate_editor as evaluate_shapes

RESULTS = Path(__file__).parent / "results"
COUNTS = {"st": (1, 2), "gst": (1,)}
"""Numbers of instructions for each kind of adapter. A GST slider scales the whole prompt, so it has one."""


@dataclass(frozen=True)
class MeasuredWorld:
    """Measurement and marks of a world.

    Attributes:
        evaluate: Function of the pipeline and the number of scenes that compares edits without sliders with the exact ones.
        ratio: Largest squared error to the exact edit, as a share of that of the unedited source.
        linearity: Largest distance from linear of each kind of adapter that has a mark.
        leak: Largest median leak into another instruction.
        psnr: Smallest median PSNR to the exact edit, in decibels; None without a mark.
        identity: Largest median distance outside the edit, as a multiple of the autoencoder's own; None without a mark.
        fades: Function of the number of scenes that sweeps cross-fades, to compare the linearity with; None without.
    """

    evaluate: Callable[[Any, int], Mapping[str, Any]]
    ratio: float
    linearity: Mapping[str, float]
    leak: float
    psnr: float | None = None
    identity: float | None = None
    fades: Callable[[int], list[SliderSweep]] | None = None


def cross_fades(scenes: int) -> list[SliderSweep]:
    """Sweep blends of the source and the exact edit of `scenes` people, whose weight is the strength.

    The training target of an adapter mixes two predictions, so this is what a slider without any error would show.
    """
    people, found = PortraitsPeople(seeds=MARKS_SEEDS), []
    for case in people.cases("bench", scenes, 1):
        example = people.examples[case.name]
        source, exact = render(example.people), render(example.target)
        blends = [torch.lerp(source, exact, strength) for strength in STRENGTHS]
        found.append(summarise(people, case, 0, STRENGTHS, torch.cat([source, *blends])))
    return found


MEASURED: dict[str, MeasuredWorld] = {
    "portraits": MeasuredWorld(
        evaluate=lambda pipeline, scenes: evaluate_portraits(pipeline, number=scenes),
        ratio=0.03,
        linearity={"st": 0.05, "gst": 0.05},
        leak=0.05,
        psnr=28.0,
        identity=1.5,
        fades=cross_fades,
    ),
    "shapes": MeasuredWorld(
        evaluate=lambda pipeline, scenes: evaluate_shapes(pipeline, 4 * scenes), ratio=0.1, linearity={"st": 0.12}, leak=0.1
    ),
}
"""Worlds by name."""


def measure_sliders(world: str, base: str, adapters: Mapping[str, str], scenes: int) -> dict[str, dict[str, Any]]:
    """Sweep each adapter's sliders on `scenes` scenes per number of instructions, with ONNX Runtime engines and 12 steps.

    Args:
        world: Name of the world.
        base: Base checkpoint.
        adapters: Adapters by kind.
        scenes: Number of scenes.
    """
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, adapter in adapters.items():
            path = Path(folder) / kind
            build_engine(base, adapter, path)
            editor = SliderEditor.from_engine(path, base)
            for count in COUNTS[kind]:
                sweeps = evaluate_sliders(editor, count, scenes, world=world)
                rows[f"{kind}, {count} instruction(s)"] = table(sweeps) | linearity_of(sweeps)
    return rows


def linearity_of(sweeps: Sequence[SliderSweep]) -> dict[str, Any]:
    """Return the mean linearity of sweeps, and that of each instruction."""
    return {
        "linearity": statistics.fmean(sweep.linearity for sweep in sweeps),
        "linearity_by_instruction": linearity_by_instruction(sweeps),
    }


def marks_of(world: MeasuredWorld, editor: Mapping[str, Any], sliders: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the marks of a measurement with their verdicts."""
    found = []
    for name, row in editor.items():
        if isinstance(row, Mapping):
            found.append(Mark(f"{name}: squared error to the exact edit / unedited", row["ratio"], "<=", world.ratio))
            if world.psnr is not None:
                found.append(Mark(f"{name}: median PSNR to the exact edit", row["psnr"], ">=", world.psnr))
    for name, row in sliders.items():
        if row["median_leak"] is not None:
            found.append(Mark(f"{name}: median leak", row["median_leak"], "<=", world.leak))
        else:
            kind = name.partition(",")[0]
            found.append(Mark(f"{name}: erased below a quarter", row["erased_below_quarter"], ">=", 0.9))
            found.append(Mark(f"{name}: Spearman at least .95", row["spearman_at_least_0.95"], ">=", 0.9))
            if kind in world.linearity:
                found.append(Mark(f"{name}: distance from linear", row["linearity"], "<=", world.linearity[kind]))
        if world.identity is not None and row["median_identity"] is not None:
            found.append(Mark(f"{name}: identity, over the autoencoder", row["median_identity"], "<=", world.identity))
    return verdicts(found, timed=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default=DEFAULT_WORLD, help="embedded world (default: %(default)s)")
    parser.add_argument("--base", help="base to measure (default: the world's, such as portraits-kontext)")
    parser.add_argument("--st", help="ST adapter (default: the world's, such as portraits-st)")
    parser.add_argument("--gst", help="GST adapter (default: the world's, such as portraits-gst)")
    parser.add_argument(
        "--scenes", type=int, default=64, help="scenes for each kind and number of edits (default: %(default)s)"
    )
    parser.add_argument("--out", type=user_path, help="file to write (default: results/WORLD_marks.json)")
    args = parser.parse_args(given)
    world, base = MEASURED[args.world], args.base or f"{args.world}-kontext"
    folder = resolve_base(base)
    editor = world.evaluate(family_of(folder).load_pipeline(folder), args.scenes)
    adapters = {kind: getattr(args, kind) or f"{args.world}-{kind}" for kind in COUNTS}
    sliders = measure_sliders(args.world, base, adapters, args.scenes)
    result = {
        "command": f"python -m slideredit_rt.bench.marks {shlex.join(given)}" if given else "make marks",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "diffusers")},
        "editor": editor,
        "sliders": sliders,
        **({} if world.fades is None else {"cross_fade": linearity_of(world.fades(args.scenes))}),
        "marks": marks_of(world, editor, sliders),
    }
    text = json.dumps(result, indent=2) + "\n"
    out = args.out or RESULTS / f"{args.world}_marks.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as temporary:
        temporary.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
