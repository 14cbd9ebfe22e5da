"""Learn an adapter's strength curve: the one along which its measured response is even."""

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
from slideredit_rt.sliders import StrengthCurve, linear_sweep

FARTHEST = 2.0
"""Largest uncalibrated strength that is tried, α = −1: the far end of the range that the paper works in."""
_SMALL_EDIT = 0.25
"""An edit that changes the score by less than this share of the median edit says nothing about the curve."""


@dataclass(frozen=True)
class CalibrationConfig:
    """Settings of a calibration.

    Attributes:
        cases: edits to measure.
        samples: strengths per edit, odd, evenly spaced from 0 to `FARTHEST`.
        steps: denoising steps.

    Raises:
        SliderEditError: too few samples, or an even number of them.
    """

    cases: int = 32
    samples: int = 17
    steps: int = 12

    def __post_init__(self) -> None:
        if self.samples < 5 or self.samples % 2 == 0:
            raise SliderEditError(
                f"{self.samples} samples were asked for; give an odd number, 5 or more, so that strength 1 is one"
            )


@dataclass(frozen=True)
class Calibration:
    """A curve and what it was learnt from.

    Attributes:
        curve: from strength to alpha.
        strengths: uncalibrated ones that were tried, 0 to `FARTHEST`.
        responses: the typical response at each, 0 as at strength 0 and 1 as at strength 1, made monotone.
        cases: how many edits it is the median of.
        left_out: edits too small to say anything.
    """

    curve: StrengthCurve
    strengths: tuple[float, ...]
    responses: tuple[float, ...]
    cases: int
    left_out: int


def curve_of_responses(
    strengths: Sequence[float] | NDArray[np.float64], responses: Sequence[float] | NDArray[np.float64], points: int = 9
) -> StrengthCurve:
    """The curve that makes a response proportional to the strength.

    Args:
        strengths: uncalibrated ones, rising from 0, 1 among them.
        responses: at each, never falling; 0 at strength 0 and 1 at strength 1.
        points: of the curve from strength 0 to 1. Above 1 they go on at the same distance as far as the response does, and from
            there alpha follows the strength one to one.
    """
    steps = points - 1
    reach = int(responses[-1] * steps + 1e-9)
    wanted = np.arange(reach + 1) / steps
    # Where the response stands still, the strengths that reach it are an interval; its start is taken.
    rising = np.concatenate([[True], np.diff(responses) > 0])
    found = np.interp(wanted, np.asarray(responses)[rising], np.asarray(strengths)[rising])
    # Suppressed is suppressed and plain is plain, whatever was measured between.
    found[0], found[steps] = 0.0, 1.0
    alphas = [*(1 - found), -found[-1]]
    return StrengthCurve((*map(float, wanted), float(wanted[-1]) + 1), tuple(map(float, alphas)))


def monotone_response(responses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over the first axis, made monotone by isotonic regression, then 0 at its first sample and 1 at strength 1.

    Args:
        responses: `[cases, samples]`, of evenly spaced strengths from 0 to `FARTHEST`.
    """
    typical = isotonic_regression(np.median(responses, axis=0)).x
    one = round((len(typical) - 1) / FARTHEST)
    rise = typical[one] - typical[0]
    if rise <= 0:
        raise SliderEditError("the response does not rise with the strength, so that no curve makes it even; train the adapter")
    scaled: NDArray[np.float64] = (typical - typical[0]) / rise
    return scaled


def calibrate(
    editor: SliderEditor, dataset: Dataset, config: CalibrationConfig | None = None, *, progress: bool = True
) -> Calibration:
    """Sweep one-instruction edits and turn the response around.

    Args:
        editor: with the adapter; its present curve is set aside.
        dataset: images and scorers; the first attribute scorer is what is made even.
        config: settings; None takes the defaults.
        progress: show a bar on standard error.

    Raises:
        SliderEditError: a response that says nothing.
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
            f"none of {len(swept)} edits shows more of its instruction at strength 1 than at 0; "
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
    threads: int | None = None,
    progress: bool = True,
) -> tuple[Adapter, Calibration]:
    """The adapter with a curve learnt from `dataset`, which costs nothing at run time.

    Args:
        base: checkpoint that the adapter is for.
        adapter: a single one; members of a bank are calibrated before they are put into it.
        engine: built with this adapter; None builds an ONNX Runtime engine for the purpose.
        threads: CPU threads of the engine; None leaves the choice to the backend.
        config, progress: as for `calibrate`.
    """
    if engine is not None:
        built = read_manifest(engine).adapter
        if built is None or built["fingerprint"] != adapter.fingerprint:
            raise SliderEditError(f"engine {str(engine)!r} was not built with {adapter.source!r}; give the one that was")
    if adapter.members:
        raise SliderEditError(f"adapter {adapter.source!r} is a bank; calibrate its members' own files and build it again")
    with tempfile.TemporaryDirectory() as folder:
        if engine is None:
            engine = Path(folder) / "engine"
            build_engine(base, adapter, engine, progress=False)
        editor = SliderEditor.from_engine(engine, base, threads=threads)
        found = calibrate(editor, dataset, config, progress=progress)
    return dataclasses.replace(adapter, curve=found.curve), found


def draw_calibration(found: Calibration, path: Path) -> None:
    """Response over strength before and after, and the curve itself."""
    from slideredit_rt.evaluation.report import new_figure, save_figure

    figure, (before, curve) = new_figure(2)
    after = [float(np.interp(1 - found.curve(s), found.strengths, found.responses)) for s in found.strengths]
    before.plot(found.strengths, found.responses, marker=".", label="alpha = 1 − strength")
    before.plot(found.strengths, after, marker=".", label="calibrated")
    before.axline((0, 0), slope=1, color="gray", linewidth=0.6)
    before.set_xlabel("strength")
    before.set_ylabel("typical response (0 at strength 0, 1 at strength 1)")
    before.legend()
    curve.plot(found.curve.strengths, found.curve.alphas, marker=".")
    curve.set_xlabel("strength")
    curve.set_ylabel("alpha")
    save_figure(figure, path)
