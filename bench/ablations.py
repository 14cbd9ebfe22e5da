"""Train variants of the shapes adapters, compare them with the shipped ones and write `results/ablations/`.

`make ablations` covers training method, alpha sampling, rank, convergence, calibration and unseen instructions. It takes more
than an hour on two cores, most of it training. A killed run continues.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from slideredit_rt.adapters import load_adapter, save_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.evaluation.calibrate import calibrate_adapter
from slideredit_rt.evaluation.dataset import CALIBRATION_SEEDS
from slideredit_rt.evaluation.evaluate import run_evaluation
from slideredit_rt.evaluation.report import markdown_table
from slideredit_rt.evaluation.run import BenchmarkConfig
from slideredit_rt.evaluation.setup import Setup
from slideredit_rt.evaluation.shapes import ShapesScenes
from slideredit_rt.families import get_family
from slideredit_rt.settings import RunSettings
from slideredit_rt.shapes.adapter_recipes import ShapesData, adapter_recipe
from slideredit_rt.shapes.world import ALL_INSTRUCTIONS, Instruction
from slideredit_rt.training.suppression import SuppressionConfig, SuppressionTrainer

RESULTS = Path(__file__).parent / "results" / "ablations"
BASE = "shapes-kontext"
_ST, _GST = adapter_recipe("st"), adapter_recipe("gst")
NARROW = tuple(
    i
    for i in ALL_INSTRUCTIONS
    if i.subject != "square" and not (i.subject == "circle" and i.change in ("purple", "cyan", "smaller"))
)
"""Instructions that the variant `st-narrow` is trained on."""
SEEN_AND_UNSEEN: Mapping[str, Sequence[Instruction]] = {
    "seen": NARROW,
    "unseen-change": [i for i in ALL_INSTRUCTIONS if i.subject == "circle" and i not in NARROW],
    "unseen-shape": [i for i in ALL_INSTRUCTIONS if i.subject == "square"],
}
SNAPSHOTS = (25, 50, 100, 200, 400)
VARIANTS: Mapping[str, SuppressionConfig] = {
    # The shipped ST adapter is trained with PPS, the shipped GST adapter with SPPS.
    "st-spps": replace(_ST, target="empty"),
    "gst-pps": replace(_GST, target="remaining"),
    "st-fixed-alpha": replace(_ST, alpha_sampling="fixed"),
    "gst-fixed-alpha": replace(_GST, alpha_sampling="fixed"),
    "st-rank-4": replace(_ST, rank=4),
    "st-rank-64": replace(_ST, rank=64),
    # The shipped recipe again, for its snapshots. Its final state shows how much two runs of a recipe differ.
    "st-convergence": _ST,
}
_FILES = ("rows.csv", "report.json", "table.md", "curves.png", "strips.png", "trajectories.png")


def train(name: str, config: SuppressionConfig, folder: Path, known: Sequence[Instruction] = ALL_INSTRUCTIONS) -> None:
    """Train a variant into `folder/NAME.safetensors`, unless the file exists."""
    out = folder / f"{name}.safetensors"
    if not out.exists():
        family = get_family("flux_kontext")
        pipeline = family.load_pipeline(resolve_base(BASE))
        snapshots = SNAPSHOTS if name == "st-convergence" else ()
        SuppressionTrainer(family, pipeline, ShapesData(known), config, out).train(snapshots=snapshots)


def calibrated(name: str, folder: Path, threads: int | None) -> Path:
    """Calibrate a shipped adapter on scenes that the benchmark does not use, and return its file."""
    out = folder / f"{name}-calibrated.safetensors"
    if not out.exists():
        adapter, _ = calibrate_adapter(
            BASE, load_adapter(name), ShapesScenes(seeds=CALIBRATION_SEEDS), run=RunSettings(threads=threads)
        )
        save_adapter(adapter, out)
    return out


def _evaluate(adapters: Sequence[str], run: Path, threads: int | None, known: Sequence[Instruction] | None = None) -> str:
    config = BenchmarkConfig(scenes=(32,), search_scenes=6)
    texts = None if known is None else [i.text for i in known]
    # Compare the slider systems only, and not the rival methods that these adapters allow.
    kinds = tuple(sorted({load_adapter(adapter).kind for adapter in adapters}))
    setup = Setup(BASE, run, adapters, run=RunSettings(threads=threads))
    report = run_evaluation(setup, config, systems=kinds, instructions=texts)
    results = RESULTS / run.name
    results.mkdir(parents=True, exist_ok=True)
    for file in _FILES:
        shutil.copy(run / file, results)
    return markdown_table(report["systems"])


def run_ablations(folder: Path, threads: int | None = None) -> str:
    """Train, calibrate and evaluate.

    Args:
        folder: Folder of the adapters and runs.
        threads: CPU threads of the engines; None uses the backend's default.

    Returns:
        The tables, as Markdown.
    """
    for name, config in VARIANTS.items():
        train(name, config, folder)
    train("st-narrow", _ST, folder, NARROW)
    ways = [f"st-convergence-step-{step}" for step in SNAPSHOTS]
    variants = [str(folder / f"{name}.safetensors") for name in (*VARIANTS, *ways)]
    shipped = [str(calibrated(name, folder, threads)) for name in ("shapes-st", "shapes-gst")]
    tables = [_evaluate(["shapes-st", "shapes-gst", *shipped, *variants], folder / "variants", threads)]
    narrow = ["shapes-st", str(folder / "st-narrow.safetensors")]
    tables += [_evaluate(narrow, folder / name, threads, known) for name, known in SEEN_AND_UNSEEN.items()]
    return "\n".join(tables)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="adapters and runs (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of the engines")
    args = parser.parse_args()
    sys.stdout.write(run_ablations(args.out, args.threads))
