"""Calibration: learn the strength curve that makes an adapter's measured response proportional to the strength."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from tqdm import tqdm

from slideredit_rt.adapters import Adapter
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Dataset
from slideredit_rt.export.build import build_engine
from slideredit_rt.settings import RunSettings
from slideredit_rt.strength import StrengthCurve, linear_sweep

FARTHEST = 2.0
"""Largest uncalibrated strength that is measured (α = −1), the end of the paper's range."""
_SMALL_EDIT = 0.25
"""Edits that change the score by less than this share of the median edit are left out."""


@dataclass(frozen=True)
class CalibrationConfig:
    """Settings of a calibration.

    Attributes:
        cases: Number of edits to measure.
        samples: Strengths per edit, an odd number, evenly spaced from 0 to `FARTHEST`.
        steps: Denoising steps.

    Raises:
        SliderEditError: `samples` is below 5 or even.
    """

    cases: int = 32
    samples: int = 17
    steps: int = 12

    def __post_init__(self) -> None:
        if self.samples < 5 or self.samples % 2 == 0:
            raise SliderEditError(
                f"samples is {self.samples}; pass an odd number of at least 5, so that strength 1 is among them"
            )


@dataclass(frozen=True)
class Calibration:
    """A strength curve and the measurement that it was learnt from.

    Attributes:
        curve: Curve from strength to alpha.
        strengths: Uncalibrated strengths that were measured, from 0 to `FARTHEST`.
        responses: Median response at each strength, made monotone and scaled to 0 at strength 0 and 1 at strength 1.
        cases: Number of edits that were used.
        left_out: Number of edits that were too small to use.
    """

    curve: StrengthCurve
    strengths: tuple[float, ...]
    responses: tuple[float, ...]
    cases: int
    left_out: int


def curve_of_responses(
    strengths: Sequence[float] | NDArray[np.float64], responses: Sequence[float] | NDArray[np.float64], points: int = 9
) -> StrengthCurve:
    """Return the curve that makes a response proportional to the strength.

    Args:
        strengths: Uncalibrated strengths, rising from 0, with 1 among them.
        responses: Response at each strength, never falling, 0 at strength 0 and 1 at strength 1.
        points: Number of curve points from strength 0 to 1. Above 1 they continue at the same spacing up to the largest
            response; beyond it, alpha falls by 1 per unit of strength.
    """
    steps = points - 1
    reach = int(responses[-1] * steps + 1e-9)
    wanted = np.arange(reach + 1) / steps
    # Where the response is flat, an interval of strengths has the same response. Use its start.
    rising = np.concatenate([[True], np.diff(responses) > 0])
    found = np.interp(wanted, np.asarray(responses)[rising], np.asarray(strengths)[rising])
    # Strength 0 must be alpha 1 (suppressed) and strength 1 must be alpha 0 (the plain edit).
    found[0], found[steps] = 0.0, 1.0
    alphas = [*(1 - found), -found[-1]]
    return StrengthCurve((*map(float, wanted), float(wanted[-1]) + 1), tuple(map(float, alphas)))


def monotone_response(responses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median response over cases, made monotone and scaled to 0 at strength 0 and 1 at strength 1.

    Args:
        responses: `[cases, samples]` at evenly spaced strengths from 0 to `FARTHEST`.

    Raises:
        SliderEditError: The response does not rise from strength 0 to strength 1.
    """
    typical = isotonic_regression(np.median(responses, axis=0)).x
    one = round((len(typical) - 1) / FARTHEST)
    rise = typical[one] - typical[0]
    if rise <= 0:
        raise SliderEditError(
            f"the median response changes by {rise:g} from strength 0 to 1 and does not rise, so it cannot be calibrated; "
            "train the adapter first"
        )
    scaled: NDArray[np.float64] = (typical - typical[0]) / rise
    return scaled


def calibrate(
    editor: SliderEditor, dataset: Dataset, config: CalibrationConfig | None = None, *, progress: bool = True
) -> Calibration:
    """Sweep edits with one instruction and invert the measured response.

    Args:
        editor: Editor with the adapter. Its current curve is replaced by the uncalibrated one.
        dataset: Images and scorers. The response of the first attribute scorer is made even.
        config: Settings; None uses the defaults.
        progress: Show a progress bar on standard error.

    Raises:
        SliderEditError: The response does not rise with the strength.
    """
    config = config or CalibrationConfig()
    strengths = linear_sweep(0.0, FARTHEST, config.samples)
    swept = []
    editor.controls = dataclasses.replace(editor.controls, curve=StrengthCurve())
    for case in tqdm(dataset.cases("bench", config.cases, 1), "calibrate", unit="edit", disable=not progress):
        prepared = editor.prepare(case.image, case.instructions, prompt=case.prompt, seed=case.seed)
        images = editor.render_tensor(prepared, [[s] for s in strengths], steps=config.steps)
        swept.append([next(iter(scores.attributes.values()))[0] for scores in dataset.score(case, images)])
    one = strengths.index(1.0)
    rises = [scores[one] - scores[0] for scores in swept]
    usable = [(s, r) for s, r in zip(swept, rises, strict=True) if r > max(0.0, _SMALL_EDIT * statistics.median(rises))]
    if not usable:
        raise SliderEditError(
            f"none of {len(swept)} edits scores higher at strength 1 than at strength 0; "
            "use images and instructions that the base can edit"
        )
    responses = monotone_response(np.array([[(v - s[0]) / r for v in s] for s, r in usable]))
    shown = tuple(map(float, responses))
    return Calibration(curve_of_responses(strengths, shown), tuple(strengths), shown, len(usable), len(swept) - len(usable))


def calibrate_adapter(
    base: str,
    adapter: Adapter,
    dataset: Dataset,
    config: CalibrationConfig | None = None,
    *,
    engine: Path | None = None,
    run: RunSettings | None = None,
    progress: bool = True,
) -> tuple[Adapter, Calibration]:
    """Return the adapter with a curve learnt from `dataset`, and the calibration. The curve costs nothing at run time.

    Args:
        base: Base checkpoint of the adapter.
        adapter: Single adapter. Members of a bank are calibrated before the bank is built.
        dataset: Images and scorers. The response of the first attribute scorer is made even.
        config: Settings; None uses the defaults.
        engine: Engine built with this adapter; None builds a temporary ONNX Runtime engine.
        run: Device, threads and options of the engine, dtype of its encoders and autoencoder; None uses the defaults.
        progress: Show a progress bar on standard error.

    Raises:
        SliderEditError: The engine holds another adapter, the adapter is a bank, or its response does not rise.
    """
    if engine is not None:
        built = read_manifest(engine).adapter
        if built is None or built["fingerprint"] != adapter.fingerprint:
            raise SliderEditError(
                f"engine {str(engine)!r} was not built with {adapter.source!r}; pass an engine that was, or leave it out"
            )
    if adapter.members:
        raise SliderEditError(f"adapter {adapter.source!r} is a bank; calibrate each member's file and build the bank again")
    with tempfile.TemporaryDirectory() as folder:
        if engine is None:
            engine = Path(folder) / "engine"
            build_engine(base, adapter, engine, progress=False)
        editor = SliderEditor.from_engine(engine, base, run)
        found = calibrate(editor, dataset, config, progress=progress)
    return dataclasses.replace(adapter, curve=found.curve), found


def draw_calibration(found: Calibration, path: Path) -> None:
    """Plot the response over the strength before and after calibration, and the curve."""
    from slideredit_rt.evaluation.report import new_figure, save_figure

    figure, (before, curve) = new_figure(2)
    after = [float(np.interp(1 - found.curve(s), found.strengths, found.responses)) for s in found.strengths]
    before.plot(found.strengths, found.responses, marker=".", label="alpha = 1 − strength")
    before.plot(found.strengths, after, marker=".", label="calibrated")
    before.axline((0, 0), slope=1, color="gray", linewidth=0.6)
    before.set_xlabel("strength")
    before.set_ylabel("median response (0 at strength 0, 1 at strength 1)")
    before.legend()
    curve.plot(found.curve.strengths, found.curve.alphas, marker=".")
    curve.set_xlabel("strength")
    curve.set_ylabel("alpha")
    save_figure(figure, path)
