"""The bench of whole edits on small modules: every column runs through the same code, and what it counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from slideredit_rt.bench import gpu_e2e
from slideredit_rt.engines import inductor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")


def test_a_rehearsal_runs_every_column_and_writes_only_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_e2e", "--rehearse", "--out", str(tmp_path)])
    monkeypatch.setattr(inductor, "COMPILER", inductor.COMPILER)  # the rehearsal changes it
    assert gpu_e2e.main() == 0
    assert sorted(p.name for p in (tmp_path / "none").iterdir()) == ["e2e_flux_kontext.json", "e2e_flux_kontext.md"]
    report = json.loads((tmp_path / "none" / "e2e_flux_kontext.json").read_text())
    columns = {column["name"]: column for column in report["columns"]}
    assert list(columns) == list(gpu_e2e.COLUMNS)
    assert report["rehearsal"] is True
    for name, column in columns.items():
        assert min(column["first_seconds"], column["moved_seconds"], column["sweep_seconds"]) > 0
        ours = name.startswith(("ours", "frozen"))
        assert (column["step_seconds"] is not None) == ours
        assert column["recompilations"] == 0 or name == "diffusers + PEFT, compiled", name
    assert columns["diffusers + PEFT, compiled"]["recompilations"] > 0, "its strength is a constant of the compiled code"
    verdicts = {mark["mark"]: mark["passed"] for mark in report["marks"]}
    assert verdicts.pop("recompilations after the first edit") is True
    assert set(verdicts.values()) == {None}, "times of a rehearsal say nothing"
    assert "| ours ST, 3 sliders |" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_e2e", "--out", str(tmp_path)])
    assert gpu_e2e.main() == 2
    assert "no CUDA device found; pass --rehearse" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
