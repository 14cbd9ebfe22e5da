"""The demo: what a newcomer runs first, and what later tools read from its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from slideredit_rt.assets import WORLDS
from slideredit_rt.cli import main
from slideredit_rt.demo import DEMOS
from slideredit_rt.editor import SliderEditor
from slideredit_rt.evaluation.worlds import EVALUATION
from slideredit_rt.samples import SAMPLES


def test_demo_leaves_engines_images_and_a_report(tmp_path: Path, capsys: Any) -> None:
    assert main(["demo", "--out", str(tmp_path), "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert {s["kind"] for s in report["sliders"]} == {"st", "gst"}
    for slider in report["sliders"]:
        assert len(slider["strengths"]) == len(slider["response"])
        assert slider["response"][slider["strengths"].index(0.0)] < 0.3 < slider["response"][slider["strengths"].index(1.0)]
        assert slider["spearman"] >= 0.9
        assert slider["leak"] is None  # of another instruction; each prompt has one
    for engine in report["engines"]:
        assert engine["max_abs_error"] <= 1e-4
        assert SliderEditor.from_engine(engine["path"]).kind in engine["path"]
    for name in ("strip.png", "grid.png"):
        assert Image.open(tmp_path / name).width > 400
    assert set(report["seconds"]) >= {"build st", "sweep gst", "total"}


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_has_cases_to_show_and_a_sample(world: str) -> None:
    demo = DEMOS[world]()
    cases = [*demo.rows["st"], *demo.rows["gst"]]
    for case, index in cases:
        assert case.instructions[index] in case.prompt
        assert demo.dataset.source_scores(case).attributes["response"] == pytest.approx((0,) * len(case.instructions), abs=0.1)
    assert {len(case.instructions) for case, _ in demo.rows["gst"]} == {1}
    assert len(demo.crossed.instructions) == 2
    assert len({case.name for case, _ in demo.rows["st"]}) > 1
    assert set(SAMPLES[world].instructions) <= set(EVALUATION[world].instructions)
