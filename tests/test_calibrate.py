"""Calibration: a curve that turns a bent response straight, learnt from sweeps and kept with the adapter."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.adapters import load_adapter
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.calibrate import CalibrationConfig, calibrate, curve_of_responses, monotone_response
from slideredit_rt.evaluation.dataset import Case, Scores
from slideredit_rt.sliders import Controls
from slideredit_rt.strength import StrengthCurve

STRENGTHS = np.linspace(0, 2, 17)


def bent(strength: Any) -> Any:
    """A response that hurries first and stands still from 1.375 on."""
    return np.minimum(1.5 * strength / (0.5 + strength), 1.1)


def test_along_the_curve_the_response_follows_the_strength() -> None:
    curve = curve_of_responses(STRENGTHS, bent(STRENGTHS))
    assert (curve(0.0), curve(1.0)) == (1.0, 0.0)
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert bent(1 - curve(strength)) == pytest.approx(strength, abs=0.03)


def test_beyond_what_the_response_reaches_alpha_follows_the_strength() -> None:
    curve = curve_of_responses(STRENGTHS, bent(STRENGTHS))
    assert curve(3.0) - curve(4.0) == pytest.approx(1.0)
    straight = curve_of_responses(STRENGTHS, STRENGTHS)
    assert [straight(s) for s in (0.0, 0.3, 1.0, 1.7, 2.5)] == pytest.approx([1.0, 0.7, 0.0, -0.7, -1.5])


def test_a_response_that_stands_still_or_turns_back_gives_a_monotone_curve() -> None:
    responses = monotone_response(np.array([[0, 0, 0.5, 0.4, 1, 0.9, 1.3, 1.2, 1.2]]))
    assert list(responses) == sorted(responses)
    assert (responses[0], responses[4]) == (0, 1)
    alphas = curve_of_responses(np.linspace(0, 2, 9), responses).alphas
    assert all(a >= b for a, b in itertools.pairwise(alphas))
    with pytest.raises(SliderEditError, match="does not rise"):
        monotone_response(np.zeros((2, 9)))


class _Bent:
    """Stands for an editor and its dataset: what a setting shows is known."""

    max_batch = 16

    def __init__(self, sizes: Sequence[float]) -> None:
        self.sizes = sizes
        self.controls = Controls("st")

    def cases(self, phase: str, count: int, sliders: int) -> list[Case]:
        return [Case(str(i), Image.new("RGB", (8, 8)), "x", ("x",), i) for i in range(count)]

    def prepare(self, image: Image.Image, sliders: Sequence[str], *, prompt: str, seed: int) -> int:
        return seed

    def render_tensor(self, prepared: int, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        return torch.tensor([[self.sizes[prepared] * bent(1 - self.controls.curve(s))] for (s,) in settings])

    def score(self, case: Case, images: Tensor) -> list[Scores]:
        return [Scores({"response": (value.item(),)}, {}) for value in images]


def test_calibrating_measures_the_response_without_the_present_curve() -> None:
    both: Any = _Bent([1.0, 2.0, 0.5])
    both.controls = Controls("st", StrengthCurve((0.0, 1.0), (0.3, 0.1)))
    found = calibrate(both, both, CalibrationConfig(cases=3), progress=False)
    assert found.curve.alphas == pytest.approx(curve_of_responses(STRENGTHS, bent(STRENGTHS)).alphas, abs=1e-6)
    assert (found.cases, found.left_out) == (3, 0)


def test_edits_that_do_nothing_are_left_out_and_counted() -> None:
    both: Any = _Bent([1.0, 0.0, 1.0])
    found = calibrate(both, both, CalibrationConfig(cases=3), progress=False)
    assert (found.cases, found.left_out) == (2, 1)
    nothing: Any = _Bent([0.0])
    with pytest.raises(SliderEditError, match="none of 1 edits"):
        calibrate(nothing, nothing, CalibrationConfig(cases=1), progress=False)
    with pytest.raises(SliderEditError, match="odd number"):
        CalibrationConfig(samples=8)


def test_the_command_writes_an_adapter_that_engines_obey(
    tmp_path: Path, engines: dict[str, Path], scene: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "calibrated.safetensors"
    command = ["adapter", "calibrate", "shapes-st", str(out), "--engine", str(engines["st"]), "--json", "--quiet"]
    size = ["--cases", "2", "--samples", "5", "--steps", "2", "--plot", str(tmp_path / "plot.png")]
    assert main([*command, *size]) == 0
    printed = json.loads(capsys.readouterr().out)["strength_curve"]
    adapter = load_adapter(out)
    assert adapter.curve == StrengthCurve(tuple(printed["strengths"]), tuple(printed["alphas"]))
    assert adapter.fingerprint == load_adapter("shapes-st").fingerprint
    assert Image.open(tmp_path / "plot.png").width > 400
    plain, calibrated = (SliderEditor.from_pretrained("shapes-kontext", a) for a in ("shapes-st", out))
    prepared = plain.prepare(scene, ["make the circle red"], prompt="make the circle red")
    expected = plain.render_tensor(prepared, [[1 - adapter.curve(0.4)]], steps=1)
    torch.testing.assert_close(calibrated.render_tensor(prepared, [[0.4]], steps=1), expected, atol=1e-6, rtol=0)
    assert main([*command, *size]) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_engine_of_another_adapter_is_refused(
    tmp_path: Path, engines: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "calibrated.safetensors"
    assert main(["adapter", "calibrate", "shapes-st", str(out), "--engine", str(engines["gst"]), "--quiet"]) == 2
    assert "was not built with" in capsys.readouterr().err
    assert not out.exists()
