"""What a slider must do, measured on 64 held-out scenes through the engine (strength 0 erases, 1 edits, between is a ramp)."""

from __future__ import annotations

import pytest

from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.families import Family
from slideredit_rt.shapes.editor_recipe import evaluate_editor
from slideredit_rt.shapes.sweeps import evaluate_sliders, table


@pytest.fixture(scope="module", params=["st", "gst"])
def one(request: pytest.FixtureRequest) -> tuple[str, dict[str, float | None]]:
    editor: SliderEditor = request.getfixturevalue(f"{request.param}_editor")
    return request.param, table(evaluate_sliders(editor, 1, progress=False))


def test_strength_zero_erases_and_the_slider_is_a_monotone_ramp_that_goes_on(one: tuple[str, dict[str, float]]) -> None:
    kind, row = one
    assert row["scenes"] == 64
    assert row["erased_below_quarter"] >= 0.9
    assert row["spearman_at_least_0.95"] >= 0.9
    assert row["beyond_at_1.5"] >= 0.6
    if kind == "st":
        assert row["linearity"] <= 0.12


def test_st_leaves_the_other_instruction_alone(st_editor: SliderEditor) -> None:
    row = table(evaluate_sliders(st_editor, 2, progress=False))
    assert row["scenes"] == 64
    assert row["median_leak"] is not None
    assert row["median_leak"] <= 0.10


def test_the_embedded_editor_edits(family: Family) -> None:
    report = evaluate_editor(family.load_pipeline(resolve_base("shapes-kontext")), 256, counts=(1, 2))
    assert report["scenes"] == 256
    assert report["instructions=1"]["ratio"] <= 0.1
    assert report["instructions=2"]["ratio"] <= 0.1
