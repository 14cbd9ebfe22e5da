"""TensorRT-RTX plans of FLUX.2-klein at full width, with one block of each kind: their sizes, and what their builds take."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from flux2_checkpoint import random_pairs, save_tiny_checkpoint

from slideredit_rt.adapters import save_adapter
from slideredit_rt.bench.full_size import FULL_SIZES
from slideredit_rt.checkpoint import meta_transformer
from slideredit_rt.engines import read_manifest
from slideredit_rt.families import family_of
from slideredit_rt.quantization.selection import select_layers
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base

pytestmark = pytest.mark.slow
VARIANTS = {"flux2": False, "flux2_kv": True}
# Of `slideredit-rt build`, in a process of its own, whose peak memory is the build's.
MOST_BYTES = 8e9


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Bases of the 4B architecture's width in bfloat16 and FP8, with the same random weights and an ST adapter beside them."""
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = {**FULL_SIZES["flux2_klein_4b"].full, "num_layers": 1, "num_single_layers": 1}
    transformer = Flux2Transformer2DModel(**sizes).to(torch.bfloat16)
    found: dict[tuple[str, str], Path] = {}
    for name, kv in VARIANTS.items():
        base = save_tiny_checkpoint(root / name, kv=kv)
        shutil.rmtree(base / "transformer")
        transformer.save_pretrained(base / "transformer")
        adapter = random_pairs(transformer, "st", rank=16, all_projections=True)
        save_adapter(dataclasses.replace(adapter, family=name), root / f"{name}.safetensors")
        maxima = dict.fromkeys(select_layers(family_of(base), meta_transformer(base / "transformer"), "fp8"), 8.0)
        quantize_base(base, root / f"{name}-fp8", QuantizeSettings("fp8"), maxima=maxima, progress=False)
        found |= {(name, "bfloat16"): base, (name, "fp8"): root / f"{name}-fp8"}
    return found


def build(base: Path, adapter: Path, out: Path) -> tuple[int, float, float]:
    """Build a plan for edits at 1024²; return its bytes, the seconds and the peak memory of the process in bytes."""
    command = [sys.executable, "-m", "slideredit_rt.cli", "build", "--base", str(base), "--adapter", str(adapter), "--quiet"]
    command += ["--backend", "tensorrt-rtx", "--targets", "sm89", "--dtype", "bfloat16", "--batch", "4", "--out", str(out)]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    plan = read_manifest(out).files["model.engine"]["bytes"]
    shutil.rmtree(out)
    return plan, time.perf_counter() - started, used.ru_maxrss * 1024


def test_plans_of_full_width_hold_their_weights_once(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sizes = {}
    for (family, precision), base in bases.items():
        sizes[family, precision], seconds, peak = build(base, base.parent / f"{family}.safetensors", tmp_path / "engine")
        plan = sizes[family, precision]
        sys.stdout.write(f"\n{family} {precision}: {plan / 1e6:.0f} MB, {seconds:.0f} s, peak {peak / 1e9:.1f} GB\n")
        assert peak < MOST_BYTES
    for precision in ("bfloat16", "fp8"):
        # The second profile, which reads source images, adds kernels and no weights.
        assert sizes["flux2_kv", precision] <= 1.03 * sizes["flux2", precision]
    for family in VARIANTS:
        assert sizes[family, "fp8"] <= 0.6 * sizes[family, "bfloat16"]
