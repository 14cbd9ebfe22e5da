"""The bench of whole edits on small modules: every column runs through the same code, and what it counts."""

from __future__ import annotations

import json
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slideredit_rt.bench import gpu_e2e
from slideredit_rt.bench.clock import Clock
from slideredit_rt.bench.columns import Selection
from slideredit_rt.bench.full_size import FULL_SIZES, SMALL_SIDE
from slideredit_rt.engines import inductor
from slideredit_rt.engines.folding import FoldedLoRALinear
from slideredit_rt.modules import MaskedLoRALinear

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")


@pytest.fixture
def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the bench with options; return the report that it wrote, and the report's name."""

    def run(*options: str) -> tuple[str, Any]:
        monkeypatch.setattr(sys, "argv", ["gpu_e2e", "--rehearse", "--out", str(tmp_path), *options])
        monkeypatch.setattr(inductor, "COMPILER", inductor.COMPILER)  # the rehearsal changes it
        assert gpu_e2e.main() == 0
        written = sorted(path.name for path in (tmp_path / "none").iterdir())
        name = written[0].removesuffix(".json")
        assert written == [f"{name}.json", f"{name}.md"]
        return name, json.loads((tmp_path / "none" / f"{name}.json").read_text())

    return run


@pytest.mark.parametrize(
    ("family", "scale", "precisions"),
    [("flux_kontext", 1.0, ("int8",)), ("qwen_image_edit", 4.0, ("fp8",)), ("flux2_klein_4b", 1.0, ("int8",))],
)
def test_a_rehearsal_runs_every_column_and_writes_only_where_it_is_told(
    family: str, scale: float, precisions: tuple[str, ...], rehearse: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name, report = rehearse("--family", family, "--precisions", *precisions)
    assert (name, report["true_cfg_scale"]) == (f"e2e_{family}", scale)
    columns = {column["name"]: column for column in report["columns"]}
    quantised = [f"{name}, {precision}" for precision in precisions for name in ("frozen", "ours ST, 3 sliders", "ours GST")]
    assert [name for name in columns if name not in quantised] == list(gpu_e2e.COLUMNS)
    after_the_marks = list(gpu_e2e.COLUMNS).index("diffusers + PEFT") + 1
    assert list(columns)[after_the_marks : after_the_marks + 3] == quantised
    assert (report["rehearsal"], report["left_out"]) == (True, [])
    for name, column in columns.items():
        compiled = name == "diffusers + PEFT, compiled"
        ours = name.startswith(("ours", "frozen"))
        parts = [column[f"{part}_seconds"] for part in ("encode", "denoise", "decode")]
        assert min(column["moved_seconds"], *parts) > 0
        assert sum(parts) == pytest.approx(column["first_seconds"])
        assert (column["sweep_seconds"] is None) == compiled
        assert (column["recompilations"] > 0) == compiled, "PEFT's strength is a constant of the compiled code"
        assert column["captures"] == (0 if ours else None)
    verdicts = {mark["mark"]: mark["passed"] for mark in report["marks"]}
    assert verdicts.pop("recompilations and captures after the first edit") is True
    assert set(verdicts.values()) == {None}, "times of a rehearsal say nothing"
    assert "| ours ST, 3 sliders |" in capsys.readouterr().out


def test_the_budget_ends_the_run_and_what_was_left_out_is_named(
    rehearse: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name, report = rehearse("--family", "qwen_image_edit_plus", "--true-cfg-scale", "1", "--budget", "1")
    assert name == "e2e_qwen_image_edit_plus_cfg_1", "a run without the family's guidance does not replace the usual one"
    measured = [column["name"] for column in report["columns"]]
    assert sorted([*measured, *report["left_out"]]) == sorted(gpu_e2e.COLUMNS)
    assert "diffusers + PEFT, compiled" in report["left_out"]
    assert not [mark for mark in report["marks"] if "PEFT" in mark["mark"]]
    assert "Left out for lack of time (`--budget 1`): " in capsys.readouterr().out


def test_an_edit_is_split_at_its_steps_and_only_waits_between_them_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times, mode = iter([0.0, 13.0, 31.0, 36.0]), ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.__setitem__(0, new))
    clock = Clock(torch.device("cpu"))
    monkeypatch.setattr(clock, "cuda", True)
    monkeypatch.setattr(clock, "now", lambda: next(times))

    def wait() -> None:
        if mode[0] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    def edit(strength: float, steps: int, *, encoded: bool, after_step: Any = None) -> None:
        wait()
        for _ in range(steps):
            wait()
            after_step()
        wait()

    parts = gpu_e2e.Parts(clock, edit, 4)
    # Steps end at 13, 19, 25 and 31 seconds, so the first one began at 7.
    assert (parts.encode, parts.step, parts.decode, parts.total) == (7.0, 6.0, 5.0, 36.0)
    assert parts.waits == 3


def test_gst_edits_with_folded_weights_that_are_gone_before_equal_ones_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "COMPILER", "eager")
    size = gpu_e2e.Size(SMALL_SIDE, 2, 1, 1.0, 520)
    bench = gpu_e2e.Bench(FULL_SIZES["flux_kontext"], size, Selection(), small=True, device=torch.device("cpu"))
    before = {name: value.clone() for name, value in bench.pipeline.transformer.state_dict().items()}
    old, make = weakref.ref(bench.pipeline.transformer), bench.base.transformer

    def make_alone(**options: Any) -> Any:
        assert old() is None, "there may be no memory for two"
        return make(**options)

    monkeypatch.setattr(bench.base, "transformer", make_alone)
    with bench.editor("gst") as editor:
        bench.our_edit(editor, gpu_e2e.INSTRUCTIONS[:1])(0.5, 2, encoded=True)
        kinds = {type(module) for module in bench.pipeline.transformer.modules()}
        assert FoldedLoRALinear in kinds
        assert MaskedLoRALinear not in kinds
    after = bench.use().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "1", "'1' is not a whole number from 2 upwards"),
        ("--repeats", "none", "'none' is not a whole number from 1 upwards"),
        ("--true-cfg-scale", "0.5", "'0.5' is not a scale from 1 to 100"),
        ("--family", "flux", "invalid choice: 'flux'"),
    ],
)
def test_options_out_of_range_are_refused(
    option: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_e2e", option, value])
    with pytest.raises(SystemExit) as refused:
        gpu_e2e.main()
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_e2e", "--out", str(tmp_path)])
    assert gpu_e2e.main() == 2
    assert "no CUDA device found; pass --rehearse" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
