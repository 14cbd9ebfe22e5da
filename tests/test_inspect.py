"""`slideredit-rt inspect`: what the manifest says, and what a GPU adds to it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slideredit_rt.cli import main
from slideredit_rt.engines import get_backend, read_manifest
from slideredit_rt.engines.manifest import describe_files, write_manifest
from slideredit_rt.engines.tensorrt import PLAN_FILE, TensorRTRTX
from slideredit_rt.engines.tensorrt.report import describe_plan
from slideredit_rt.files import sha256

Inspect = Callable[[Path], tuple[str, dict[str, Any]]]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Lines and JSON of the command."""

    def run(engine: Path) -> tuple[str, dict[str, Any]]:
        assert main(["inspect", str(engine)]) == 0
        lines = capsys.readouterr().out
        assert main(["inspect", str(engine), "--json"]) == 0
        return lines, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def compiled(engines: dict[str, Path], tmp_path: Path) -> Path:
    """A folder that says it holds a TensorRT plan."""
    (tmp_path / PLAN_FILE).write_bytes(b"plan")
    manifest = dataclasses.replace(
        read_manifest(engines["st"]),
        backend="tensorrt",
        backend_version="11.4.0.106",
        dtype="bfloat16",
        lowering="plugin",
        targets=["sm90"],
        updates={"native": 14, "plugin": 100},
        layers={"SHUFFLE": 3, "MATRIX_MULTIPLY": 57},
        compatibility={"versions": True, "hardware": "ampere_plus"},
        ranges={"batch": [1, 2, 4]},
        files=describe_files(tmp_path, [PLAN_FILE]),
        links={},
    )
    write_manifest(manifest, tmp_path)
    return tmp_path


def test_an_onnx_runtime_engine(engines: dict[str, Path], kind: str, inspect: Inspect) -> None:
    lines, report = inspect(engines[kind])
    manifest = read_manifest(engines[kind])
    ((form, count),) = manifest.updates.items()
    assert "dtype      float32" in lines
    assert f"lowering   {form}; updates: {count} {form}" in lines
    assert "input      alpha float32 [batch, sliders]" in lines
    assert "output     sample float32" in lines
    assert "device" not in lines
    assert "device" not in report
    assert "layers" not in lines
    assert report == json.loads(json.dumps(manifest.to_json()))


def test_links_are_named_with_their_sizes(engines: dict[str, Path], tmp_path: Path, inspect: Inspect) -> None:
    shutil.copytree(engines["st"], tmp_path / "engine", copy_function=os.link)
    shard = tmp_path / "engine" / "shard.safetensors"
    shard.write_bytes(bytes(2**20))
    manifest = read_manifest(tmp_path / "engine")
    (tmp_path / "engine" / "manifest.json").unlink()
    links = {
        "shard.safetensors": {"bytes": 2**20, "sha256": sha256(tmp_path / "engine" / "shard.safetensors"), "kind": "symbolic"}
    }
    write_manifest(dataclasses.replace(manifest, links=links), tmp_path / "engine")
    lines, report = inspect(tmp_path / "engine")
    assert "link       shard.safetensors 1.0 MiB (symbolic)" in lines
    assert report["links"] == links


def test_a_frozen_engine_has_no_updates(compiled: Path, inspect: Inspect) -> None:
    write_manifest(dataclasses.replace(read_manifest(compiled), adapter=None, lowering="native", updates={}), compiled)
    lines, _ = inspect(compiled)
    assert "adapter    none" in lines
    assert "lowering   native; updates: none" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_compiled_engine_without_a_gpu(compiled: Path, inspect: Inspect) -> None:
    lines, report = inspect(compiled)
    for line in (
        "backend    tensorrt 11.4.0.106 or a later version of the same major",
        "dtype      bfloat16",
        "lowering   plugin; updates: 100 plugin, 14 native",
        "targets    sm90",
        "hardware   ampere_plus",
        "profile    batch 1 to 4, usually 2",
        "layers     before fusion: 57 MATRIX_MULTIPLY, 3 SHUFFLE",
    ):
        assert line in lines.splitlines()
    assert lines.count("memory and fused layers are known only where the engine can run: ") == 1
    assert list(report["device"]) == ["unavailable"]


def plan(layers: list[Any]) -> Any:
    """Stands for a deserialized plan with the given layers."""
    inspector = SimpleNamespace(
        get_engine_information=lambda form: json.dumps({"Layers": layers} if form.name == "JSON" else None)
    )
    return SimpleNamespace(
        create_engine_inspector=lambda: inspector,
        get_engine_stat=lambda stat: {"TOTAL_WEIGHTS_SIZE": 8 * 2**20}[stat.name],
        streamable_weights_size=6 * 2**20,
        get_device_memory_size_for_profile_v2=lambda profile_index: (profile_index + 1) * 2**19,
        num_layers=len(layers),
        num_optimization_profiles=2,
    )


@pytest.fixture
def trt() -> Any:
    pytest.importorskip("tensorrt_rtx")
    return importlib.import_module("tensorrt_rtx")


def test_the_report_asks_only_for_what_tensorrt_has(trt: Any) -> None:
    asked = vars(plan([]))
    assert set(asked) <= set(dir(trt.ICudaEngine))
    assert hasattr(trt.EngineInspector, "get_engine_information")


@pytest.mark.parametrize(
    ("layers", "types"),
    [
        ([{"LayerType": "gemm"}, {"LayerType": "PluginV3"}, {"LayerType": "gemm"}], {"gemm": 2, "PluginV3": 1}),
        (["__myl_CastMul_myl0_1", "a", "b"], {}),
    ],
)
def test_the_report_of_a_plan(trt: Any, layers: list[Any], types: dict[str, int]) -> None:
    assert describe_plan(trt, plan(layers)) == {
        "weight_bytes": 8 * 2**20,
        "streamable_weight_bytes": 6 * 2**20,
        "context_bytes": 2 * 2**19,
        "layers": 3,
        "layer_types": types,
    }


@pytest.mark.parametrize(
    ("layers", "line"),
    [
        ([{"LayerType": "gemm"}] * 2 + [{"LayerType": "kgen"}], "layers     after fusion, 3: 2 gemm, 1 kgen"),
        (["a"], "layers     after fusion, 1: types not recorded in the plan"),
    ],
)
def test_a_compiled_engine_with_a_gpu(
    compiled: Path, trt: Any, inspect: Inspect, monkeypatch: pytest.MonkeyPatch, layers: list[Any], line: str
) -> None:
    write_manifest(dataclasses.replace(read_manifest(compiled), backend="tensorrt-rtx"), compiled)
    opened = SimpleNamespace(plan=plan(layers))
    monkeypatch.setattr(TensorRTRTX, "open", lambda *_: nullcontext(opened))
    lines, report = inspect(compiled)
    assert "device     8.0 MiB of weights, 6.0 MiB of them streamable" in lines
    assert "device     1.0 MiB of working memory at the profile's largest sizes" in lines
    assert line in lines.splitlines()
    assert report["device"] == get_backend("tensorrt-rtx").report(compiled, read_manifest(compiled))
