"""Measure the embedded editor and its adapters on held-out scenes and write `results/shapes_marks.json` (`make marks`)."""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import get_family
from slideredit_rt.shapes.editor_recipe import evaluate_editor
from slideredit_rt.shapes.sweeps import evaluate_sliders, table

RESULTS = Path(__file__).parent / "results" / "shapes_marks.json"


def measure_marks() -> dict[str, Any]:
    """Evaluate the editor on 256 scenes and each slider on 64, with ONNX Runtime engines and 12 steps."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("st", "gst"):
            path = Path(folder) / kind
            build_engine("shapes-kontext", f"shapes-{kind}", path)
            editor = SliderEditor.from_engine(path)
            for count in (1, 2) if kind == "st" else (1,):
                rows[f"{kind}, {count} instruction(s)"] = table(evaluate_sliders(editor, count))
    return {
        "command": "make marks",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "diffusers")},
        "editor": evaluate_editor(get_family("flux_kontext").load_pipeline(resolve_base("shapes-kontext"))),
        "sliders": rows,
    }


if __name__ == "__main__":
    result = json.dumps(measure_marks(), indent=2)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(result + "\n")
    sys.stdout.write(result + "\n")
