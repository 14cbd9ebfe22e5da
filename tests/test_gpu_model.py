"""The full-size bench on small blocks: every column through the same code, what it counts, what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from slideredit_rt.bench import gpu_model
from slideredit_rt.bench.columns import Selection
from slideredit_rt.bench.full_size import FULL_SIZES
from slideredit_rt.bench.gpu_model import Bench, Size
from slideredit_rt.engines import inductor
from slideredit_rt.engines.folding import FoldedLoRALinear
from slideredit_rt.modules import MaskedLoRALinear, SliderBackbone


def test_rehearsal_runs_every_column_and_writes_only_where_it_is_told(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "slideredit_rt.bench.gpu_model", "--rehearse", "--precisions", "fp8", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "none").iterdir()) == ["model_flux_kontext.json", "model_flux_kontext.md"]
    report = json.loads((tmp_path / "none" / "model_flux_kontext.json").read_text())
    columns = {column["name"]: column for column in report["columns"]}
    quantised = [f"{name}, fp8" for name in ("frozen", "ours ST, 3 sliders", "ours GST")]
    assert [name for name in columns if name not in quantised] == list(gpu_model.COLUMNS)
    assert [name for name, column in columns.items() if column["precision"] == "fp8"] == quantised
    assert report["failed"] == {}
    assert report["rehearsal"] is True
    for name, column in columns.items():
        assert column["milliseconds"] > 0
        assert column["compiled_graphs"] > 0 or name == "ours ST, 3 sliders", "its shapes are those of one slider"
        if name.startswith("ours"):
            assert column["recompilations"] == 0
    assert columns["ours ST, 3 sliders"]["compiled_graphs"] == 0
    assert columns["PEFT GST"]["recompilations"] > 0, "its strength is a constant of the compiled code"
    assert report["batch of 4"]["recompilations"] == 0
    assert report["sweep"]["separate_s"] > 0
    verdicts = {mark["mark"]: mark["passed"] for mark in report["marks"]}
    assert verdicts.pop("strength change, recompilations") is True
    assert set(verdicts.values()) == {None}, "times of a rehearsal say nothing"


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(sys, "argv", ["gpu_model", "--out", str(tmp_path)])
    assert gpu_model.main() == 2
    assert "no CUDA device found; pass --rehearse" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image_edit", "flux2_klein_4b"])
def test_columns_compute_what_they_say_and_leave_the_weights_as_they_were(name: str) -> None:
    device = torch.device("cpu")
    size = Size(16, 32, (2, 3, 4), 1)
    bench = Bench(FULL_SIZES[name], size, Selection(), small=True, device=device)
    transformer = bench.use()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    run_base = bench.family.run

    def ours(kind: str, spans: tuple[int, ...]) -> Any:
        backbone = SliderBackbone(bench.family, transformer, bench.adapters[kind])
        inputs = bench.inputs | gpu_model.slider_inputs(kind, size, spans, 1, device)  # type: ignore[arg-type]
        try:
            return backbone(inputs)
        finally:
            backbone.remove()

    def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
        return float((actual - expected).norm() / expected.norm())

    with torch.no_grad():
        st, gst, frozen = ours("st", (9,)), ours("gst", (48,)), run_base(transformer, bench.inputs)
        assert relative(frozen, gst) > 0.01
        with gpu_model.published(transformer, bench.adapters["st"], size):
            assert relative(run_base(transformer, bench.inputs), st) < 0.02
        with gpu_model.peft_adapter(transformer, bench.adapters["gst"]) as set_strength:
            assert relative(run_base(transformer, bench.inputs), gst) < 0.02
            set_strength(0.0)
            assert torch.equal(run_base(transformer, bench.inputs), frozen)
        with gpu_model.merged(transformer, bench.adapters["gst"]):
            assert relative(run_base(transformer, bench.inputs), gst) < 0.05
        assert torch.equal(run_base(transformer, bench.inputs), frozen)
    after = transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_gst_is_measured_folded_and_the_old_weights_are_gone_before_equal_ones_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inductor, "COMPILER", "eager")
    device, size = torch.device("cpu"), Size(16, 32, (2, 3, 4), 1)
    bench = Bench(FULL_SIZES["flux_kontext"], size, Selection(), small=True, device=device)
    before = {name: value.clone() for name, value in bench.use().state_dict().items()}
    old, make = weakref.ref(bench.use()), bench.base.transformer

    def make_alone(**options: Any) -> Any:
        assert old() is None, "there may be no memory for two"
        return make(**options)

    monkeypatch.setattr(bench.base, "transformer", make_alone)
    with bench.engine(bench.adapters["gst"], gpu_model.BATCH) as engine:
        engine(bench.inputs | gpu_model.slider_inputs("gst", size, (48,), 1, device))
        kinds = {type(module) for module in bench.use().modules()}
        assert FoldedLoRALinear in kinds
        assert MaskedLoRALinear not in kinds
    after = bench.use().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["st", "gst"])
@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_columns_of_a_quantised_base_compute_with_it_and_leave_the_usual_weights_to_the_next(
    kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "COMPILER", "eager")
    device, size = torch.device("cpu"), Size(16, 32, (2, 3, 4), 1)
    bench = Bench(FULL_SIZES["flux_kontext"], size, Selection(), small=True, device=device)
    inputs = bench.inputs | gpu_model.slider_inputs(kind, size, bench.spans(kind), 1, device)  # type: ignore[arg-type]
    backbone = SliderBackbone(bench.family, bench.use(), bench.adapters[kind])
    with torch.no_grad():
        exact = backbone(inputs)
    backbone.remove()
    with bench.engine(bench.adapters[kind], gpu_model.BATCH, precision) as engine:
        assert (engine.manifest.lowering, set(engine.manifest.quantised)) == ("operator", {precision, "int8"})
        actual, off = (engine(inputs | {"alpha": alpha}).clone() for alpha in (inputs["alpha"], 0 * inputs["alpha"]))
    error = float((actual - exact).norm() / exact.norm())
    assert 1e-3 < error < 0.3, "it is quantised, but the same transformer"
    assert not torch.equal(actual, off)
    with bench.engine(None, gpu_model.BATCH) as engine:
        assert engine.manifest.quantised == {}
