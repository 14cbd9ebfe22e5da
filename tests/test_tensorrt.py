"""TensorRT-RTX: real builds on a machine without a GPU, and the checks that stand before a GPU is needed."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from slideredit_rt import SliderEditError, cli
from slideredit_rt.assets import resolve_base
from slideredit_rt.engines import BuildSettings, open_engine
from slideredit_rt.engines.backend import BuildJob, Limits
from slideredit_rt.engines.manifest import DIGESTS, Manifest, read_manifest
from slideredit_rt.engines.request import check_request
from slideredit_rt.engines.tensorrt import Environment, TensorRT, TensorRTOptions, TensorRTRTX
from slideredit_rt.engines.tensorrt import build as tensorrt_build
from slideredit_rt.engines.tensorrt.build import check_memory, configure, image_rows_of, profile_ranges
from slideredit_rt.engines.tensorrt.options import HardwareCompatibility
from slideredit_rt.families import Family

BUILD = ["build", "--base", "shapes-kontext", "--backend", "tensorrt-rtx", "--quiet"]
SIZES = ["--resolution", "64", "--max-text-rows", "24", "--batch", "4"]


@pytest.fixture(scope="module", params=["st", "gst"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded editor with each adapter, built for real by the command."""
    out = tmp_path_factory.mktemp("rtx") / "engine"
    assert cli.main([*BUILD, *SIZES, "--adapter", f"shapes-{request.param}", "--targets", "sm86,sm120", "--out", str(out)]) == 0
    return out


def test_build_writes_a_plan_its_log_and_a_manifest_and_nothing_else(engine: Path) -> None:
    assert sorted(p.name for p in engine.iterdir()) == [DIGESTS, "build.log", "manifest.json", "model.engine"]
    assert (engine / "model.engine").stat().st_size > 10_000_000, "weights are in the plan"
    assert "Adding 1 engine(s) to plan file" in (engine / "build.log").read_text()


def test_manifest_says_what_the_engine_takes_and_where_it_runs(engine: Path) -> None:
    manifest = read_manifest(engine)
    assert (manifest.backend, manifest.targets, manifest.dtype) == ("tensorrt-rtx", ["sm86", "sm120"], "float32")
    assert manifest.adapter is not None
    form = "native" if manifest.kind == "st" else "folded"
    assert (manifest.lowering, manifest.updates) == (form, {form: manifest.adapter["modules"]})
    assert manifest.layers["MATRIX_MULTIPLY"] > manifest.adapter["modules"]
    assert manifest.backend_version == version("tensorrt_rtx")
    assert manifest.ranges["batch"] == [1, 1, 4]
    assert manifest.ranges["text_rows"] == [1, 24, 24]
    assert manifest.ranges["image_rows"] == [32, 128, 131]
    assert manifest.ranges["rows"] == [33, 152, 155]
    assert {s.name for s in manifest.inputs} >= {"alpha", "token_mask"}


def test_inspect_shows_targets_and_profile(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(engine)]) == 0
    out = capsys.readouterr().out
    assert "targets    sm86, sm120" in out
    assert "profile    image_rows 32 to 131, usually 128" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_engine_says_so_in_one_sentence(engine: Path) -> None:
    with pytest.raises(SliderEditError, match=r"needs an NVIDIA GPU \(sm86, sm120\), but none is visible"):
        open_engine(engine)


def test_truncated_plan_is_refused_before_anything_is_loaded(engine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    copy.mkdir()
    for file in engine.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[: -100 if file.suffix == ".engine" else None])
    with pytest.raises(SliderEditError, match=r"model\.engine' has \d+ bytes instead of"):
        open_engine(copy)


@pytest.fixture
def manifest(engine: Path) -> Manifest:
    return read_manifest(engine)


@pytest.mark.parametrize(
    ("package", "capability", "message"),
    [
        (None, "sm86", r"pip install 'slideredit-rt\[tensorrt-rtx\]'"),
        ("1.0.0", "sm86", r"was built by TensorRT-RTX .*, but 1\.0\.0 is installed; build it again"),
        ("same", None, "none is visible; build one with --backend onnxruntime"),
        ("same", "sm90", "was built for sm86, sm120, but this GPU is sm90; build it again with --targets sm90"),
    ],
)
def test_machine_that_cannot_run_the_engine(
    manifest: Manifest, package: str | None, capability: str | None, message: str
) -> None:
    here = Environment(manifest.backend_version if package == "same" else package, capability)
    with pytest.raises(SliderEditError, match=message):
        TensorRTRTX().check_environment(manifest, here)


def test_machine_that_can_run_the_engine(manifest: Manifest) -> None:
    TensorRTRTX().check_environment(manifest, Environment(manifest.backend_version, "sm120"))


@pytest.mark.parametrize(
    ("axis", "size", "message"),
    [
        ("batch", 5, "built for 1 to 4 in the axis 'batch', got 5"),
        ("text_rows", 25, "built for 1 to 24 in the axis 'text_rows', got 25"),
        ("image_rows", 31, "built for 32 to 131 in the axis 'image_rows', got 31"),
        ("sliders", 9, "built for 1 to 8 in the axis 'sliders', got 9"),
    ],
)
def test_request_outside_the_profile_names_the_axis_the_size_and_the_range(
    manifest: Manifest, axis: str, size: int, message: str
) -> None:
    sizes = {"batch": 4, "text_rows": 24, "image_rows": 128, "sliders": 2}
    assert check_request(manifest, request_of(manifest, sizes)).items() >= sizes.items()
    with pytest.raises(SliderEditError, match=message):
        check_request(manifest, request_of(manifest, sizes | {axis: size}))


def request_of(manifest: Manifest, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Tensors of these sizes, a GST mask covering text and image rows."""
    sizes = sizes | {"rows": sizes["text_rows"] + sizes["image_rows"]}
    return {s.name: torch.empty(s.resolve(sizes), dtype=getattr(torch, s.dtype)) for s in manifest.inputs}


def test_axes_of_a_request_must_agree(manifest: Manifest) -> None:
    request = request_of(manifest, {"batch": 2, "text_rows": 24, "image_rows": 128, "sliders": 3})
    with pytest.raises(SliderEditError, match=r"'alpha' has shape \[1, 3\], expected \['batch', 'sliders'\]"):
        check_request(manifest, request | {"alpha": torch.empty(1, 3)})
    with pytest.raises(SliderEditError, match="'token_mask' is missing"):
        check_request(manifest, {k: v for k, v in request.items() if k != "token_mask"})


def test_smallest_batch_is_that_of_the_profile(manifest: Manifest) -> None:
    assert manifest.min_batch == 1
    assert dataclasses.replace(manifest, ranges={**manifest.ranges, "batch": [2, 4, 8]}).min_batch == 2
    assert dataclasses.replace(manifest, ranges={}).min_batch == 1


def test_profile_gives_every_input_three_shapes(manifest: Manifest) -> None:
    limits = Limits(profile_ranges((1, 1, 4), (1, 24, 24), (32, 128, 131), (1, 2, 8)))
    (shapes,) = limits.profiles(manifest.inputs)
    assert shapes["hidden_states"] == [(1, 32, 64), (1, 128, 64), (4, 131, 64)]
    assert shapes["alpha"] == [(1, 1), (1, 2), (4, 8)]


def test_image_rows_follow_the_autoencoder(tmp_path: Path) -> None:
    assert image_rows_of(resolve_base("shapes-kontext"), 64) == (32, 128, 131)
    flux = tmp_path / "flux"
    (flux / "vae").mkdir(parents=True)
    (flux / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [128, 256, 512, 512]}))
    low, usual, high = image_rows_of(flux, 1024)
    assert usual == 8192
    # Kontext's preferred sizes (diffusers, PREFERRED_KONTEXT_RESOLUTIONS): the widest, the tallest, and some between.
    for width, height in ((672, 1568), (688, 1504), (720, 1456), (880, 1184), (1024, 1024), (1248, 832), (1568, 672)):
        assert low <= 2 * (width // 16) * (height // 16) <= high
    with pytest.raises(SliderEditError, match="resolution 1000 is not a multiple of 16"):
        image_rows_of(flux, 1000)


def test_build_that_would_not_fit_into_memory_is_refused_with_the_figures() -> None:
    assert check_memory(2 * 2**30, 8 * 2**30) == "about 5.4 GiB of host memory for 2,048 MiB of weights"
    with pytest.raises(
        SliderEditError, match=r"about 53\.8 GiB of host memory for 24,576 MiB of weights, but 16\.0 GiB are free"
    ):
        check_memory(24 * 2**30, 16 * 2**30)


def test_memory_is_checked_before_the_build_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = dataclasses.make_dataclass("free", [("available", int)])(10)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    out = tmp_path / "engine"
    assert cli.main([*BUILD, *SIZES, "--adapter", "shapes-st", "--out", str(out)]) == 2
    assert "the build needs about" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*BUILD, "--targets", "sm90"], "does not build for 'sm90'; choose from sm120"),
        ([*BUILD, "--resolution", "63"], "resolution 63 is not a multiple of 8"),
        (["build", "--base", "shapes-kontext", "--targets", "sm86"], "--targets is for --backend tensorrt or tensorrt-rtx"),
        ([*BUILD, "--targets", ""], "an engine needs at least one target; choose from"),
        ([*BUILD, "--timing-cache", "t"], "--timing-cache is for --backend tensorrt; TensorRT-RTX takes --targets"),
        ([*BUILD, "--lowering", "plugin"], "the backend tensorrt-rtx does not support the lowering 'plugin'"),
        ([*BUILD, "--batch", "4,2,8"], "the batch sizes 4,2,8 are not ascending"),
        ([*BUILD, "--batch", "1,2"], "--batch has 2 numbers; give the largest batch, or MIN,OPT,MAX"),
        ([*BUILD, "--max-sliders", "0"], "can have 1 to 256 sliders, got 0"),
        (["build", "--base", "shapes-kontext", "--dtype", "bfloat16"], "cannot multiply bfloat16 matrices on the CPU"),
        (["build", "--base", "shapes-kontext", "--dtype", "float16"], "cannot run in float16: its activations exceed"),
        (
            ["build", "--base", "shapes-kontext", "--backend", "openvino"],
            "unknown backend 'openvino'; known: inductor, onnxruntime",
        ),
    ],
)
def test_bad_build_options_are_one_sentence_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, "--out", str(tmp_path / "engine")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_node_that_the_parser_refuses_is_named(tmp_path: Path, family: Family) -> None:
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Mystery", ["x"], ["y"], "the_node", domain="nobody")], "g", [x], [y])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports), path)
    job = BuildJob(family, tmp_path, None, "native", BuildSettings(), Limits(targets=("sm89",)))
    with pytest.raises(SliderEditError, match=r"TensorRT-RTX refuses node 'the_node' \(Mystery\)"):
        tensorrt_build.build_plan(TensorRTRTX(), job, path, [], tmp_path)
    assert not (tmp_path / "model.engine").exists()


def configured(backend: TensorRT, options: TensorRTOptions, targets: tuple[str, ...] = ()) -> Any:
    """A real builder configuration; TensorRT-RTX's has every option of TensorRT's, though it ignores the hardware level."""
    trt = TensorRTRTX().module()
    config = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR)).create_builder_config()
    configure(trt, config, options)
    backend.configure(trt, config, options, targets)
    return config


def test_options_reach_the_builder(tmp_path: Path) -> None:
    options = TensorRTOptions(
        optimization_level=2,
        workspace_mib=64,
        weight_streaming=True,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        timing_cache=tmp_path / "timings",
    )
    import tensorrt_rtx as trt

    config = configured(TensorRT(), options)
    assert config.builder_optimization_level == 2
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 * 2**20
    assert config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    levels = {level.upper() for level in typing.get_args(HardwareCompatibility)}
    assert levels <= set(trt.HardwareCompatibilityLevel.__members__)
    assert config.get_timing_cache() is not None
    plain = configured(TensorRTRTX(), TensorRTOptions(), ("sm86", "sm120"))
    assert [plain.get_compute_capability(i) for i in range(plain.num_compute_capabilities)] == [
        trt.ComputeCapability.SM86,
        trt.ComputeCapability.SM120,
    ]
    assert not plain.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)


def test_plugins_of_an_engine_for_every_card_since_ampere_are_compiled_for_ampere() -> None:
    options = TensorRTOptions
    assert tensorrt_build.plugin_target(["sm120"], options(hardware_compatibility="ampere_plus")) == "sm80"
    assert tensorrt_build.plugin_target(["sm120"], options(hardware_compatibility="same_compute_capability")) == "sm120"
    assert tensorrt_build.plugin_target(["sm90"], options()) == "sm90"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_tensorrt_builds_for_the_card_at_hand_and_says_so_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRT, "import_name", "tensorrt_rtx")  # stands for the package that is not here
    with pytest.raises(SliderEditError, match="no CUDA device is visible, but TensorRT builds for this machine"):
        TensorRT().targets(TensorRTOptions())
    with pytest.raises(SliderEditError, match="--targets is for --backend tensorrt-rtx; TensorRT builds for this machine"):
        TensorRT().targets(TensorRTOptions(targets=("sm89",)))


def test_interrupted_build_stops_the_builder_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    command = [sys.executable, "-m", "slideredit_rt.cli", *BUILD, *SIZES, "--adapter", "shapes-st", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        # The log grows while the builder works.
        if any(log.stat().st_size > 100_000 for log in tmp_path.glob(".engine.*.tmp/build.log")):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "slideredit-rt: interrupted; no partial files were left\n")
    assert not list(tmp_path.iterdir())


def test_refused_node_of_an_exported_model_is_said_to_come_from_its_module(tmp_path: Path, family: Family) -> None:
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    node = helper.make_node("Mystery", ["x"], ["y"], "node_mystery", domain="nobody")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'transformer', 'transformer.norm_out', 'mystery']")
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=imports), path)
    job = BuildJob(family, tmp_path, None, "native", BuildSettings(), Limits(targets=("sm89",)))
    with pytest.raises(SliderEditError, match=r"refuses node 'node_mystery' \(Mystery\) in transformer.norm_out: "):
        tensorrt_build.build_plan(TensorRTRTX(), job, path, [], tmp_path)
