"""What the shipped few-step LoRA must do: `make few-step-marks` on few scenes, and every scene in slow tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slideredit_rt.adapters import load_adapter
from slideredit_rt.assets import resolve_adapter
from slideredit_rt.bench import few_step_marks
from slideredit_rt.families import Family
from slideredit_rt.shapes.adapter_recipes import few_step_recipe


def test_four_steps_with_the_lora_are_closer_to_twenty_eight_than_without() -> None:
    errors = few_step_marks.measure_edits("shapes-turbo", 4, 2)
    many, few, turbo = errors["28 steps"], errors["4 steps"], errors["4 steps with the LoRA"]
    assert turbo["error_to_exact_edit"] <= 1.5 * many["error_to_exact_edit"]
    assert turbo["error_to_28_steps"] <= 0.6 * few["error_to_28_steps"]


@pytest.mark.slow
def test_every_mark_holds(tmp_path: Path) -> None:
    few_step_marks.main(["--scenes", "32", "--out", str(tmp_path / "marks.json")])
    marks = json.loads((tmp_path / "marks.json").read_text())["marks"]
    assert [mark for mark in marks if not mark["passed"]] == []


def test_the_shipped_lora_comes_from_the_shipped_recipe(family: Family) -> None:
    lora = load_adapter("shapes-turbo", family)
    assert lora.training == few_step_recipe().__dict__
    assert resolve_adapter("shapes-turbo").stat().st_size < 600_000
    assert len(lora.pairs) == 39
