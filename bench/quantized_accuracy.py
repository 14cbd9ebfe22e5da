"""Measure the accuracy of every precision on the embedded editor and write `results/quantized_accuracy.json`.

Everything runs in eager torch on the CPU. The reference is the unquantised editor in float32:

    python -m slideredit_rt.bench.quantized_accuracy
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from slideredit_rt.editor import SliderEditor
from slideredit_rt.quantization.calibrate import ActivationRun
from slideredit_rt.quantization.precisions import PRECISIONS
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base
from slideredit_rt.shapes.world import held_out_examples, scene_image
from slideredit_rt.sliders import Slider

RESULTS = Path(__file__).parent / "results" / "quantized_accuracy.json"
STRENGTHS = (0.0, 0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Accuracy:
    """Errors of a quantised editor against the unquantised one.

    Attributes:
        step_rms: RMS error of the predicted velocities along the reference's own trajectories, divided by their RMS.
        worst_step_rms: The same for the worst step of any edit.
        psnr: Median PSNR of final images at each of `STRENGTHS`, in dB.
        worst_psnr: Smallest PSNR of a final image, in dB.
        effect_rms: RMS error of the slider's effect, the image at strength 1 minus that at strength 0, divided by its RMS.
    """

    step_rms: float
    worst_step_rms: float
    psnr: tuple[float, ...]
    worst_psnr: float
    effect_rms: float


class _Shadow:
    """Engine that answers with the reference and compares the predictions of others for the same inputs."""

    def __init__(self, reference: Any, others: Mapping[str, Any]) -> None:
        self.reference, self.others, self.rows = reference, others, 0
        self.errors: dict[str, list[tuple[float, float]]] = {name: [] for name in others}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        expected: Tensor = self.reference(inputs)
        for name, other in self.others.items():
            # Predictions for the rows of the source image are not used.
            wanted = expected[:, : self.rows].double()
            error = (other(inputs)[:, : self.rows].double() - wanted).square().mean().item()
            self.errors[name].append((error, wanted.square().mean().item()))
        return expected


def measure_accuracy(bases: Mapping[str, Path], kind: str, scenes: int = 16, steps: int = 12) -> dict[str, Accuracy]:
    """Compare quantised copies of the embedded base with it, by name.

    Args:
        bases: Folders of the copies.
        kind: Adapter, `st` or `gst`.
        scenes: Number of held-out scenes with one instruction.
        steps: Denoising steps.
    """
    reference = SliderEditor.from_pretrained("shapes-kontext", f"shapes-{kind}")
    editors = {name: SliderEditor.from_pretrained(folder, f"shapes-{kind}") for name, folder in bases.items()}
    shadow = _Shadow(reference.engine, {name: editor.engine for name, editor in editors.items()})
    reference.engine = shadow  # type: ignore[assignment]
    images: dict[str, list[Tensor]] = {name: [] for name in ("reference", *bases)}
    for seed, example in enumerate(tqdm(held_out_examples(scenes, 1, seed=0), f"accuracy {kind}", unit="scene")):
        slider, source = Slider(example.instructions[0].text), scene_image(example)
        prepared = reference.prepare(source, [slider], prompt=example.prompt, seed=seed)
        shadow.rows = prepared.conditioning.latents.shape[1]
        for name, editor in (("reference", reference), *editors.items()):
            images[name].append(editor.render_tensor(prepared, [[s] for s in STRENGTHS], steps=steps))
    return {name: _accuracy(shadow.errors[name], images[name], images["reference"]) for name in bases}


def _accuracy(steps: Sequence[tuple[float, float]], images: Sequence[Tensor], expected: Sequence[Tensor]) -> Accuracy:
    psnr = [
        [-10 * math.log10(max(error, 1e-12)) for error in (one - other).double().square().flatten(1).mean(1).tolist()]
        for one, other in zip(images, expected, strict=True)
    ]
    zero, one = STRENGTHS.index(0.0), STRENGTHS.index(1.0)
    effects = [(i[one] - i[zero], e[one] - e[zero]) for i, e in zip(images, expected, strict=True)]
    wrong = sum((found - wanted).double().square().sum().item() for found, wanted in effects)
    return Accuracy(
        step_rms=math.sqrt(sum(error for error, _ in steps) / sum(size for _, size in steps)),
        worst_step_rms=math.sqrt(max(error / size for error, size in steps)),
        psnr=tuple(statistics.median(column) for column in zip(*psnr, strict=True)),
        worst_psnr=min(map(min, psnr)),
        effect_rms=math.sqrt(wrong / sum(wanted.double().square().sum().item() for _, wanted in effects)),
    )


def measure_all(scenes: int) -> dict[str, Any]:
    """Quantise the embedded base to every precision and measure both adapters."""
    with tempfile.TemporaryDirectory() as root:
        bases = {name: Path(root) / name for name in PRECISIONS}
        calibration = ActivationRun(adapters=("shapes-st", "shapes-gst"))
        for name, folder in bases.items():
            quantize_base("shapes-kontext", folder, QuantizeSettings(name, calibration=calibration))
        rows = {kind: measure_accuracy(bases, kind, scenes) for kind in ("st", "gst")}
    return {
        "command": "python -m slideredit_rt.bench.quantized_accuracy",
        "date": datetime.now(UTC).date().isoformat(),
        "scenes": scenes,
        "strengths": STRENGTHS,
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "accuracy": {kind: {name: asdict(accuracy) for name, accuracy in found.items()} for kind, found in rows.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the accuracy of every precision on the embedded editor.")
    parser.add_argument("--scenes", type=int, default=16, help="number of held-out scenes (default: %(default)s)")
    text = json.dumps(measure_all(parser.parse_args().scenes), indent=2)
    RESULTS.write_text(text + "\n")
    sys.stdout.write(text + "\n")
