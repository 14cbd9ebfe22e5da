"""The demo: what a newcomer runs first, and what later tools read from its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor


def test_demo_leaves_engines_images_and_a_report(tmp_path: Path, capsys: Any) -> None:
    assert main(["demo", "--out", str(tmp_path), "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert {s["kind"] for s in report["sliders"]} == {"st", "gst"}
    for slider in report["sliders"]:
        assert len(slider["strengths"]) == len(slider["response"])
        assert slider["response"][slider["strengths"].index(0.0)] < 0.3 < slider["response"][slider["strengths"].index(1.0)]
        assert slider["spearman"] >= 0.9
        assert (slider["leak"] is None) == (slider["kind"] == "gst")
    for engine in report["engines"]:
        assert engine["max_abs_error"] <= 1e-4
        assert SliderEditor.from_engine(engine["path"]).kind in engine["path"]
    for name in ("strip.png", "grid.png"):
        assert Image.open(tmp_path / name).width > 400
    assert set(report["seconds"]) >= {"build st", "sweep gst", "total"}
