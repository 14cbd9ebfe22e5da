"""EditSettings: one value for every way to ask for an edit."""

from __future__ import annotations

import typing
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from slideredit_rt.cli import _parser
from slideredit_rt.commands.edit import edit_settings
from slideredit_rt.errors import SliderEditError
from slideredit_rt.serving.schemas import EditFields
from slideredit_rt.settings import EditOptions, EditSettings, merge

ASKED = EditSettings("make the circle red", 7, 5, 2.5, 3.0, "blur")


def test_keyword_arguments_are_the_fields() -> None:
    assert typing.get_type_hints(EditOptions) == typing.get_type_hints(EditSettings)


def test_what_is_given_by_name_goes_before_the_settings() -> None:
    assert merge(None, {}) == EditSettings()
    assert merge(None, {"seed": 7}) == EditSettings(seed=7)
    assert merge(ASKED, {"steps": None}) == EditSettings("make the circle red", 7, None, 2.5, 3.0, "blur")
    with pytest.raises(TypeError, match="stepz"):
        merge(ASKED, {"stepz": 3})  # type: ignore[typeddict-unknown-key]


def test_they_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        ASKED.seed = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 2**64}, "the seed is 18446744073709551616; give a whole number from −2⁶³ to 2⁶⁴ − 1"),
        ({"seed": -(2**63) - 1}, "the seed is -9223372036854775809"),
        ({"seed": 0.5}, r"the seed is 0\.5"),
        ({"steps": 0}, "0 denoising steps were asked for; give at least 1"),
        ({"guidance_scale": float("nan")}, "guidance scale is nan; give a finite number"),
        ({"true_cfg_scale": float("inf")}, "true-CFG scale is inf; give a finite number"),
    ],
)
def test_values_that_make_no_edit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        EditSettings(**given)


def test_the_command_line_and_http_say_the_same() -> None:
    command = ["edit", "engine", "--image", "i.png", "--slider", "make the circle red", "--out", "o.png"]
    options = ["--prompt", ASKED.prompt, "--seed", "7", "--steps", "5", "--guidance-scale", "2.5"]
    options += ["--true-cfg-scale", "3", "--negative-prompt", "blur"]
    body = {field.name: getattr(ASKED, field.name) for field in fields(ASKED) if field.name != "steps"}
    parse = _parser().parse_args
    assert edit_settings(parse([*command, *options])) == EditFields(num_inference_steps=5, **body).settings(4) == ASKED
    assert edit_settings(parse(command)) == EditFields().settings(preview_steps=4) == EditSettings()
    assert EditFields(preview=True).settings(preview_steps=4) == EditSettings(steps=4)
