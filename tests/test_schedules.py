"""Strengths that change over the run: the value, every way to write one, and what the engine gets in each step."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from slideredit_rt import cli
from slideredit_rt.commands.edit import parse_slider, parse_swept_slider
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Case
from slideredit_rt.evaluation.systems.slideredit import ScheduledToken, SelectiveToken
from slideredit_rt.serving import EditRequest, EditService
from slideredit_rt.settings import EditSettings
from slideredit_rt.sliders import Slider
from slideredit_rt.strength import StrengthSchedule

RED, DARK = "make the circle red", "make the background dark"
RISE = StrengthSchedule(((0.0, 0.0), (0.5, 1.0)))


@pytest.fixture
def editor(st_editor: SliderEditor) -> SliderEditor:
    """The ST editor, whose engine may be replaced."""
    return copy.copy(st_editor)


def watch(editor: SliderEditor) -> list[list[list[float]]]:
    """Let the editor's engine note the alphas of every call."""
    engine, seen = editor.engine, list[list[list[float]]]()

    def note(inputs: Mapping[str, Tensor]) -> Tensor:
        seen.append([[round(a, 5) for a in row] for row in inputs["alpha"].tolist()])
        return engine(inputs)

    editor.engine = note
    return seen


def test_a_schedule_is_linear_between_its_points_and_constant_beyond() -> None:
    schedule = StrengthSchedule(((0.2, 1.0), (0.6, 3.0)))
    assert [schedule(f) for f in (0.0, 0.2, 0.3, 0.6, 1.0)] == pytest.approx([1.0, 1.0, 1.5, 3.0, 3.0])
    assert StrengthSchedule(((0.5, 0.7),))(0.1) == 0.7


def test_two_points_at_one_fraction_are_a_jump() -> None:
    schedule = StrengthSchedule(((0.5, 0.0), (0.5, 1.0)))
    assert [schedule(f) for f in (0.49, 0.5, 0.51)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((), "a strength schedule has no points; pass at least one"),
        (((0.5, 1.0), (0.2, 0.0)), r"\[\[0.5, 1.0\], \[0.2, 0.0\]\] goes back in time; pass its points in ascending order"),
        (((0.0, math.nan),), "has a number that is not finite"),
        (((math.nan, 1.0),), "has a number that is not finite"),
        (((0.0, 0.0), (1.5, 1.0)), "has a fraction of the run outside 0 to 1"),
        (((-0.1, 0.0),), "has a fraction of the run outside 0 to 1"),
    ],
)
def test_what_is_not_a_schedule_is_refused_in_one_sentence(points: Any, message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        StrengthSchedule(points)


def test_the_command_line_writes_strengths_at_fractions() -> None:
    assert parse_slider("smile=0@0,1@0.3") == Slider("smile", StrengthSchedule(((0.0, 0.0), (0.3, 1.0))))
    assert parse_swept_slider("smile = 0@0, 1@0.3")[0] == Slider("smile", StrengthSchedule(((0.0, 0.0), (0.3, 1.0))))
    assert f"{RISE:g}" == str(RISE) == "0@0,1@0.5"
    assert StrengthSchedule.parse(str(RISE)) == RISE


@pytest.mark.parametrize("value", ["1@", "@0.3", "1@0.3@2", "0@0,,1@1", "0@0,1", "a@0"])
def test_what_is_not_written_as_a_schedule_is_shown_how(value: str) -> None:
    with pytest.raises(SliderEditError, match=r"is not a strength schedule; write strengths .* such as 0@0,1@0.3"):
        parse_slider(f"smile={value}")


@pytest.mark.parametrize("value", ["1@0.5,0@0.2", "nan@0", "1@2"])
def test_the_command_refuses_a_bad_schedule_before_it_opens_anything(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--image", str(tmp_path / "none.png"), "--slider", f"smile={value}", "--out", str(tmp_path / "o.png")]
    assert cli.main(["edit", str(tmp_path / "none"), *arguments]) == 2
    assert "the strength schedule [[" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_step_gets_the_strength_at_its_start(editor: SliderEditor, scene: Image.Image) -> None:
    prepared, seen = editor.prepare(scene, [RED, DARK]), watch(editor)
    editor.render_tensor(prepared, [[RISE, 0.25], [0.5, 1.0]], steps=4)
    # alpha = 1 − strength.
    assert seen == [
        [[1.0, 0.75], [0.5, 0.0]],
        [[0.5, 0.75], [0.5, 0.0]],
        [[0.0, 0.75], [0.5, 0.0]],
        [[0.0, 0.75], [0.5, 0.0]],
    ]


def test_a_schedule_that_stays_is_the_number(st_editor: SliderEditor, scene: Image.Image) -> None:
    prepared = st_editor.prepare(scene, [RED])
    flat = StrengthSchedule(((0.0, 0.25), (1.0, 0.25)))
    assert torch.equal(
        st_editor.render_tensor(prepared, [[flat]], steps=3), st_editor.render_tensor(prepared, [[0.25]], steps=3)
    )


def test_a_schedule_that_jumps_from_the_base_model_is_a_late_start(st_editor: SliderEditor, scene: Image.Image) -> None:
    prepared = st_editor.prepare(scene, [RED])
    late = StrengthSchedule(((0.5, 1.0), (0.5, 0.0)))
    assert torch.equal(
        st_editor.render_tensor(prepared, [[late]], steps=4),
        st_editor.render_tensor(prepared, [[0.0]], steps=4, slider_start=0.5),
    )


def test_a_schedule_beyond_float32_is_refused_where_it_gets_there(st_editor: SliderEditor, scene: Image.Image) -> None:
    prepared = st_editor.prepare(scene, [RED])
    steep = StrengthSchedule(((0.0, 0.0), (1.0, 1e39)))
    with pytest.raises(SliderEditError, match=r"'make the circle red' has strength 0@0,1e\+39@1, which exceeds float32"):
        st_editor.render_tensor(prepared, [[steep]], steps=2)


def test_requests_with_other_schedules_and_steps_share_engine_calls(editor: SliderEditor, scene: Image.Image) -> None:
    strengths: Sequence[tuple[Any, ...]] = ((RISE,), (0.5,), (StrengthSchedule(((0.0, 2.0), (1.0, 0.0))),))
    requests = [
        EditRequest(scene, (Slider(RED),), tuple(strengths), EditSettings(steps=4)),
        EditRequest(scene, (Slider(DARK),), ((RISE,),), EditSettings(steps=3)),
    ]
    seen = watch(editor)
    with EditService(editor) as service:
        tickets = [service.submit_tensor(request) for request in requests]
        results = [ticket.future.result(60) for ticket in tickets]
    assert max(map(len, seen)) >= 3
    for request, result in zip(requests, results, strict=True):
        for setting, image in zip(request.strengths, result, strict=True):
            alone = editor.render_tensor(editor.prepare(scene, request.sliders, request.settings), [setting])[0]
            assert (image - alone).abs().max() <= 1e-5


def test_the_command_edits_with_a_schedule(
    engines: dict[str, Path], tmp_path: Path, scene: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.save(tmp_path / "scene.png")
    given = ["--image", str(tmp_path / "scene.png"), "--steps", "2", "--quiet", "--json", "--out", str(tmp_path / "o.png")]
    assert cli.main(["edit", str(engines["st"]), "--slider", f"{RED}=0@0,1@0.5", *given]) == 0
    assert json.loads(capsys.readouterr().out)["sliders"] == [{"instruction": RED, "strength": [[0.0, 0.0], [0.5, 1.0]]}]
    editor = SliderEditor.from_engine(engines["st"])
    assert Image.open(tmp_path / "o.png").tobytes() == editor.edit(scene, [Slider(RED, RISE)], steps=2).tobytes()


def test_the_scheduled_system_ramps_from_the_base_models_strength(editor: SliderEditor, scene: Image.Image) -> None:
    case = Case("one", scene, RED, (RED,), seed=3)
    system, seen = ScheduledToken(editor), watch(editor)
    images = system.render(system.prepare(case), [[0.0], [1.0]], 12)
    assert [alphas[0][0] for alphas in seen[:6]] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert {alphas[1][0] for alphas in seen} == {0.0}
    plain = SelectiveToken(editor)
    others = plain.render(plain.prepare(case), [[0.0], [1.0]], 12)
    assert torch.equal(images[1], others[1])
    assert not torch.equal(images[0], others[0])
