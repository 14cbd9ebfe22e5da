"""The GPU benches on a machine without a GPU: every path once, the tables and the marks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slideredit_rt.bench import gpu_kernels, gpu_tensorrt
from slideredit_rt.bench.gpu_kernels import Case, Measurement

ROOT = Path(__file__).parents[1]


def run(*arguments: str, bench: str = "gpu_kernels") -> subprocess.CompletedProcess[str]:
    # One thread: on small matrices several wait for each other longer than they compute.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", f"slideredit_rt.bench.{bench}", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def measured() -> list[Measurement]:
    """Two shapes; `fused` is fastest on the first, `folded` on the second, and `update` was wrong there."""
    st = Case("ST", "text", "q", 1, 512, 32, 3072, 3072)
    gst = Case("GST", "joint", "q", 1, 8704, 8704, 3072, 3072)
    times: dict[Case, dict[str, float | None]] = {
        st: {"base": 16.0, "update": 18.0, "folded": 19.0, "fused": 17.0, "PEFT eager": 24.0},
        gst: {"base": 250.0, "update": None, "folded": 255.0, "fused": 270.0, "PEFT eager": 350.0},
    }
    found = []
    for case, row in times.items():
        for name, elapsed in row.items():
            m = Measurement(case, name, 0.0, 0.1, elapsed, elapsed and round(elapsed / row["base"], 4))  # type: ignore[operator]
            m.note = "" if elapsed else "wrong result, not timed"
            found.append(m)
    return found


@pytest.mark.parametrize("target", ["gpu-test", "gpu-bench", "gpu-trt", "gpu-model", "gpu-e2e"])
def test_gpu_targets_run_a_complete_copy_of_the_package(target: str, tmp_path: Path) -> None:
    """Seen by a Python without site-packages, in which the package is not installed."""
    python, stage = tmp_path / "python", tmp_path / "stage"
    where = "from importlib.util import find_spec; print(find_spec('slideredit_rt.kernels').origin)"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -c "{where}"\n')
    python.chmod(0o755)
    line = ["make", "--no-print-directory", target, f"STAGE={stage}", f"GPU_PYTHON={python}"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(stage / "slideredit_rt" / "kernels" / "__init__.py")


def test_rehearsal_computes_every_path_and_times_none() -> None:
    done = run("--rehearse")
    assert done.returncode == 0, done.stderr
    table, fp8 = done.stdout.split("## FP8")
    header, _, *rows = table.strip().splitlines()
    assert all(name in header for name in (*gpu_kernels.PATHS, *gpu_kernels.OTHERS))
    assert len(rows) == 2
    assert all(row.count("right") == len(gpu_kernels.PATHS) + len(gpu_kernels.OTHERS) for row in rows)
    header, _, row = (line for line in fp8.splitlines() if line.startswith("|"))
    assert all(name in header for name in gpu_kernels.FP8_FORMS)
    assert row.count("right") == len(gpu_kernels.FP8_FORMS)


def test_fp8_section_compares_with_the_16_bit_product() -> None:
    case = Case("ST", "text", "q", 1, 512, 32, 3072, 3072)
    times = {"base": 40.0, "fp8 base": 24.0, "fp8 vendor + update": 30.0}
    text = gpu_kernels.fp8_section([Measurement(case, name, 0.0, 0.1, time, time / 40) for name, time in times.items()])
    assert "| 40.0 | None | 0.600 | 0.750 |" in text
    assert "this GPU does not compute in FP8" in gpu_kernels.fp8_section([])


@pytest.mark.parametrize("bench", ["gpu_kernels", "gpu_tensorrt"])
def test_without_a_gpu_the_bench_says_so_and_writes_nothing(bench: str, tmp_path: Path) -> None:
    done = run("--out", str(tmp_path), bench=bench)
    if done.returncode == 0:
        pytest.skip("there is a GPU here")
    assert done.returncode == 2
    assert "no CUDA device found; pass --rehearse" in done.stderr
    assert not list(tmp_path.iterdir())


def test_cases_cover_every_projection_batch_and_number_of_active_rows() -> None:
    cases = list(gpu_kernels.cases())
    assert {c.batch for c in cases} == {1, 2, 4}
    assert {c.active for c in cases if c.kind == "ST"} == {8, 32, 128}
    assert {c.rows for c in cases if c.kind == "GST"} == {512, 8192, 8704}
    assert {(c.k, c.n) for c in cases} == {(3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072)}
    assert len(cases) == len(set(cases))


def test_a_wrong_result_shows_no_speed(measured: list[Measurement]) -> None:
    row = gpu_kernels.table(measured).splitlines()[3]
    assert "wrong result, not timed" in row
    assert "1.020" in row


def test_marks_are_the_worst_cases_of_the_best_path(measured: list[Measurement]) -> None:
    assert list(gpu_kernels.marks(measured).values()) == [1.0625, 1.02, pytest.approx(255 / 350, abs=1e-3)]


def test_tensorrt_rehearsal_builds_plans_and_compares_the_same_graphs_in_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    # In this process, which has the traces at hand.
    monkeypatch.setattr(sys, "argv", ["gpu_tensorrt", "--rehearse", "--out", str(tmp_path)])
    assert gpu_tensorrt.main() == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.strip().splitlines()[2:]]
    assert [row[:4] for row in rows] == [
        ["embedded editor", "st", "tensorrt-rtx", "native"],
        ["embedded editor", "st", "onnxruntime", "native"],
        ["embedded editor, int8", "st", "tensorrt-rtx", "native"],
        ["embedded editor, int8", "st", "onnxruntime", "native"],
        ["FLUX 1+1, narrow", "gst", "tensorrt-rtx", "folded"],
        ["FLUX 1+1, narrow", "gst", "onnxruntime", "folded"],
    ]
    assert [row[4] for row in rows] == ["12 native"] * 4 + ["15 folded"] * 2
    for name, _, backend, *_, error, allowed, step, eager, note in rows:
        assert (step, eager) == ("–", "–"), "nothing is timed"
        if backend == "onnxruntime":
            assert float(error) <= float(allowed) == (3e-2 if "int8" in name else 1e-5)
        else:
            assert (error, note) == ("–", "built, not run")
    assert not list(tmp_path.iterdir())


def test_tensorrt_bench_records_a_refusal_and_marks_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(gpu_tensorrt, "SETTINGS", 1)
    case = gpu_tensorrt.Case("embedded editor", "shapes-kontext", "shapes-st", 64, 24, 128, ("plugin",))
    reference = gpu_tensorrt.Reference(case, torch.float32, "cpu")
    m = gpu_tensorrt.measure(case, reference, "tensorrt", "plugin", "bfloat16", tmp_path / "engine", run=True)
    assert "pip install 'slideredit-rt[tensorrt]'" in m.note
    assert not m.wrong
    m.error = 2 * reference.allowed_error
    assert m.wrong
    assert "WRONG" in gpu_tensorrt.table([m])
    m.error = float("nan")
    assert m.wrong
    m.error = reference.allowed_error
    m.graph_equals_enqueue = False
    assert m.wrong


def test_a_missing_package_is_one_sentence(tmp_path: Path) -> None:
    code = "import sys; sys.modules['diffusers'] = None; import slideredit_rt.bench.gpu_tensorrt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("gpu_tensorrt: the package diffusers is missing; install")
