"""What a slider must do, measured on held-out scenes through the engine (strength 0 erases, 1 edits, between is a ramp).

Every run measures a quarter of the scenes of `make marks`, and the slow tests all of them, against the same marks.
"""

from __future__ import annotations

from typing import Any

import pytest

from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.evaluation.sweeps import evaluate_sliders, table
from slideredit_rt.families import Family
from slideredit_rt.shapes.editor_recipe import evaluate_editor


@pytest.fixture(params=[16, pytest.param(64, marks=pytest.mark.slow)])
def scenes(request: pytest.FixtureRequest) -> int:
    """How many scenes a slider is swept on."""
    return int(request.param)


def test_strength_zero_erases_and_the_slider_is_a_monotone_ramp_that_goes_on(
    request: pytest.FixtureRequest, kind: str, scenes: int
) -> None:
    editor: SliderEditor = request.getfixturevalue(f"{kind}_editor")
    row: dict[str, Any] = table(evaluate_sliders(editor, 1, scenes, world="shapes", progress=False))
    assert row["scenes"] == scenes
    assert row["erased_below_quarter"] >= 0.9
    assert row["spearman_at_least_0.95"] >= 0.9
    assert row["beyond_at_1.5"] >= 0.6
    if kind == "st":
        assert row["linearity"] <= 0.12


def test_st_leaves_the_other_instruction_alone(st_editor: SliderEditor, scenes: int) -> None:
    row = table(evaluate_sliders(st_editor, 2, scenes, world="shapes", progress=False))
    assert row["scenes"] == scenes
    assert row["median_leak"] is not None
    assert row["median_leak"] <= 0.10


def test_the_embedded_editor_edits(family: Family, scenes: int) -> None:
    report = evaluate_editor(family.load_pipeline(resolve_base("shapes-kontext")), 4 * scenes, counts=(1, 2))
    assert report["scenes"] == 4 * scenes
    assert report["instructions=1"]["ratio"] <= 0.1
    assert report["instructions=2"]["ratio"] <= 0.1
