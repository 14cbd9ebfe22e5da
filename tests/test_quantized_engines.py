"""Engines of quantised bases: agreement with the eager reference, limits of each precision, and what plans compute in."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from refusals import refused
from torch import Tensor, nn

from slideredit_rt.adapters import load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.checkpoint import meta_transformer
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BuildSettings, open_engine
from slideredit_rt.engines.backend import DType
from slideredit_rt.engines.tensorrt import TensorRTOptions
from slideredit_rt.engines.tensorrt.build_log import check_precisions, plan_types, read_layers
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.sweeps import evaluate_sliders, table
from slideredit_rt.export import quantised
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family
from slideredit_rt.quantization.calibrate import ActivationRun
from slideredit_rt.quantization.precisions import PRECISIONS
from slideredit_rt.quantization.selection import select_layers
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base
from slideredit_rt.settings import RunSettings
from slideredit_rt.sliders import Slider
from slideredit_rt.tensor_files import read_header
from slideredit_rt.verify import verify_engine

SIZES = (2, 8, 16)
Quantized = Callable[[str], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The embedded base in a precision, quantised once."""

    @functools.cache
    def quantized(precision: str) -> Path:
        folder = tmp_path_factory.mktemp("quantised") / precision
        calibration = ActivationRun(adapters=("shapes-st", "shapes-gst"), cases=2, steps=3)
        quantize_base("shapes-kontext", folder, QuantizeSettings(precision, calibration=calibration), progress=False)
        return folder

    return quantized


@pytest.fixture(scope="module")
def engine(base: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An engine of the embedded base, built once."""

    @functools.cache
    def built(precision: str, kind: str, backend: str = "onnxruntime", targets: tuple[str, ...] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("engines") / f"{precision}-{kind}-{backend}"
        options = None if backend == "onnxruntime" else TensorRTOptions(targets=targets)
        dtype: DType | None = None if backend == "onnxruntime" else "bfloat16"
        settings = BuildSettings(backend, dtype=dtype, options=options)
        build_engine(base(precision), f"shapes-{kind}", folder, settings, progress=False)
        return folder

    return built


# ONNX Runtime


@torch.no_grad()
@pytest.mark.parametrize(
    ("precision", "kind", "largest"),
    [("int8", "st", 0.012), ("int8", "gst", 0.012), ("int4", "gst", 0.012), ("fp8", "st", 0.045)],
)
def test_engine_agrees_with_the_eager_reference_of_the_same_base(
    precision: str, kind: str, largest: float, base: Quantized, engine: Callable[..., Path]
) -> None:
    """MatMulNBits rounds activations to 8 bits, which the reference does not.

    An FP8 value near a tie rounds either way, which is 6% of it, and decides what happens to values near ties after it.
    """
    manifest, opened = open_engine(engine(precision, kind))
    reference: Any = SliderEditor.from_pretrained(base(precision), f"shapes-{kind}").engine
    inputs = example_inputs(reference.backbone, manifest.config, *SIZES, 2)
    expected = reference(inputs)
    assert (opened(inputs) - expected).norm() <= largest * expected.norm()
    assert manifest.precision == precision
    assert sum(manifest.quantised.values()) == 46


@pytest.mark.parametrize(("precision", "kind"), [("int8", "st"), ("int8", "gst"), ("int4", "gst"), ("fp8", "st")])
def test_verify_holds_an_engine_to_the_limits_of_its_precision(
    precision: str, kind: str, engine: Callable[..., Path], scene: Image.Image
) -> None:
    report = verify_engine(engine(precision, kind), scene, [Slider("make the circle red")])
    limits = PRECISIONS[precision].limits
    assert report.passed, report.verdict
    assert 0 < max(c.relative_rms for c in report.comparisons) <= limits.step_rms
    assert limits.psnr <= report.worst_psnr < 90
    assert 0 < report.effect_rms < 0.2, "the error of the slider's effect is reported by itself"
    assert report.verdict.startswith(f"passed: {precision} against the unquantised base")


def test_verify_refuses_an_engine_beyond_the_limits(
    engine: Callable[..., Path], scene: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(PRECISIONS["int4"]), "limits", PRECISIONS["int8"].limits)
    report = verify_engine(engine("int4", "gst"), scene, [Slider("make the circle red")])
    assert not report.passed
    assert report.verdict.startswith("FAILED: int4 against the unquantised base")


def test_weights_are_stored_in_the_form_that_the_backend_reads(engine: Callable[..., Path]) -> None:
    def operators(folder: Path) -> set[str]:
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        return {node.op_type for node in graph.node}

    fp8, int8 = engine("fp8", "st"), engine("int8", "st")
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(fp8)
    assert (fp8 / "converted.safetensors").stat().st_size < 0.7e6, "FP8 weights stay where they lie; INT8 modulation does not"
    assert "MatMulNBits" in operators(int8)
    assert "DequantizeLinear" not in operators(int8)
    assert (int8 / "converted.safetensors").stat().st_size < 2.2e6, "unquantised, these weights take 7.7 MB"


def test_projections_of_the_same_rows_share_the_rounded_activations(engine: Callable[..., Path]) -> None:
    graph = onnx.load(engine("fp8", "st") / "model.onnx", load_external_data=False).graph
    rounded = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    # Two double blocks round 4 inputs in each stream, three single blocks 2. Modulation is not rounded.
    assert len(rounded) == 2 * 2 * 4 + 3 * 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_sliders_hold_the_marks_of_the_unquantised_editor(precision: str, engine: Callable[..., Path], kind: str) -> None:
    editor = SliderEditor.from_engine(engine(precision, kind))
    row: dict[str, Any] = table(evaluate_sliders(editor, 1, 16, world="shapes", progress=False))
    sys.stdout.write(f"\n{precision} {kind}: {row}\n")
    assert row["erased_below_quarter"] >= 0.9
    assert row["spearman_at_least_0.95"] >= 0.9
    assert row["beyond_at_1.5"] >= 0.6
    if kind == "st":
        assert row["linearity"] <= 0.12


# Refusals


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("nvfp4", (), "the backend onnxruntime does not run nvfp4 linears; use --backend tensorrt or tensorrt-rtx"),
        (
            "fp8",
            ("--backend", "tensorrt-rtx", "--targets", "sm86"),
            "GPUs of sm86 do not compute in fp8, which needs sm89 or later",
        ),
        ("int8", ("--lowering", "folded"), "'folded' cannot be combined with a quantised base"),
    ],
)
def test_what_a_quantised_base_cannot_be_built_with(
    base: Quantized,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    command = ("build", "--base", base(precision), "--adapter", "shapes-gst", "--out", tmp_path / "e", "--quiet", *options)
    assert message in refused(capsys, *command)
    assert not list(tmp_path.iterdir())


def test_a_scale_of_zero_is_refused_before_anything_is_built(
    base: Quantized, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base("int8"), copy)
    shard = next((copy / "transformer").glob("*.safetensors"))
    name = "transformer_blocks.0.attn.to_q.weight_scale"
    place = read_header(shard)[0][name]
    damaged = bytearray(shard.read_bytes())
    damaged[place.offset : place.offset + 4] = bytes(4)
    shard.write_bytes(damaged)
    command = ("build", "--base", copy, "--adapter", "shapes-st", "--out", tmp_path / "e", "--quiet")
    assert f"has a scale of 0 in {name}, but scales are positive finite numbers" in refused(capsys, *command)
    assert not (tmp_path / "e").exists()


def test_verify_needs_the_unquantised_base(
    base: Quantized, engine: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(engine("int8", "st"), tmp_path / "engine")
    copy = tmp_path / "base"
    shutil.copytree(base("int8"), copy)
    config = json.loads((copy / "transformer" / "config.json").read_text())
    for change, message in (
        ({"source": "somebody/flux"}, "was not quantised from a base that is on this machine"),
        ({"fused": ["style"]}, "with fused LoRAs"),
    ):
        changed = config | {"quantization_config": config["quantization_config"] | change}
        (copy / "transformer" / "config.json").write_text(json.dumps(changed))
        manifest = tmp_path / "engine" / "manifest.json"
        described = json.loads(manifest.read_text())
        from slideredit_rt.checkpoint import fingerprint_base

        described["base"] = {"source": str(copy), "fingerprint": fingerprint_base(copy)}
        manifest.write_text(json.dumps(described))
        assert message in refused(capsys, "verify", tmp_path / "engine")


# TensorRT-RTX: what the plans compute in

NAME, WIDTH = "transformer_blocks.0.attn.to_q", "[1024,1024]"


def layer(kind: str, inputs: str, constants: str, nodes: str = f"[ONNX Layer: {NAME}/base]") -> str:
    def tensors(types: str) -> str:
        each = (
            f"{{ Name: t, Dimensions: {WIDTH}, Strides: [1024,1], Datatype: {dtype}, Format: x }}" for dtype in types.split()
        )
        return f"[ {', '.join(each)}]" if types else "[]"

    return (
        f"Name: a, LayerType: {kind}, Inputs: {tensors(inputs)}, Constants: {tensors(constants)}, "
        f"Outputs: {tensors('BFloat16')}, TacticName: b, StreamId: 0, Metadata: {nodes}"
    )


@pytest.mark.parametrize(
    ("lines", "precision", "holds"),
    [
        ([layer("gemm", "FP8", "FP8")], "fp8", True),
        ([layer("runtime_fusion", "BFloat16", "Int8")], "int8", True),
        ([layer("gemm", "FP8", "FP8"), layer("kgen", "BFloat16", "BFloat16")], "fp8", True),
        ([layer("kgen", "", "Int8"), layer("gemm", "BFloat16 BFloat16", "")], "int8", False),
        ([layer("gemm", "FP8", "FP8"), layer("gemm", "BFloat16", "BFloat16")], "fp8", False),
    ],
    ids=["fp8", "inside the gemm", "scaled after the gemm", "expanded before", "wider for one target"],
)
def test_a_projection_counts_only_if_every_gemm_of_it_reads_the_stored_weight(
    lines: list[str], precision: str, holds: bool
) -> None:
    layers = read_layers(["VERBOSE: Layers:\n", *lines])
    if holds:
        check_precisions(layers, {NAME: precision}, "TensorRT-RTX")
    else:
        with pytest.raises(
            SliderEditError, match=rf"TensorRT-RTX would multiply with a wider copy of the {precision} weight of {NAME}"
        ):
            check_precisions(layers, {NAME: precision}, "TensorRT-RTX")


@pytest.mark.parametrize("lines", [[], [layer("gemm", "FP8", "FP8", "[ONNX Layer: another/base]")]], ids=["empty", "absent"])
def test_a_log_that_does_not_mention_a_projection_proves_nothing(lines: list[str]) -> None:
    with pytest.raises(SliderEditError, match=f"the build log of TensorRT does not say how {NAME} is computed"):
        check_precisions(read_layers(lines), {NAME: "fp8"}, "TensorRT")


def test_gemms_are_counted_by_their_operands_and_weights_by_their_bytes() -> None:
    types = plan_types(
        read_layers([layer("gemm", "FP8", "FP8"), layer("gemm", "BFloat16", "Int4"), layer("kgen", "", "Float")])
    )
    assert types.gemms == {"FP8 × FP8": 1, "BFloat16 × Int4": 1}
    assert types.weights == {"FP8": 2**20, "Int4": 2**19, "Float": 2**22}


@pytest.mark.parametrize(
    ("precision", "kind", "targets", "operands"),
    [
        ("fp8", "st", ("sm89", "sm120"), "FP8 × FP8"),
        ("int4", "gst", ("sm86",), "BFloat16 × Int4"),
        ("nvfp4", "gst", ("sm120",), "FP4E2M1 × FP8"),
    ],
)
def test_plan_computes_every_quantised_projection_from_its_stored_weight(
    precision: str, kind: str, targets: tuple[str, ...], operands: str, engine: Callable[..., Path]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    manifest, _ = _manifest(engine(precision, kind, "tensorrt-rtx", targets))
    assert manifest["precision"] == precision
    assert manifest["plan"]["gemms"][operands] >= 7
    assert manifest["targets"] == list(targets)


def _manifest(folder: Path) -> tuple[dict[str, Any], Path]:
    return json.loads((folder / "manifest.json").read_text()), folder


def test_a_plan_that_would_expand_weights_is_refused_with_the_projections_name(
    base: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without inputs of their own, TensorRT-RTX joins the modulations of all blocks."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(quantised.QDQ, "_own_input", lambda self, graph, build, x: x)
    settings = BuildSettings("tensorrt-rtx", dtype="bfloat16", options=TensorRTOptions(targets=("sm89",)))
    with pytest.raises(SliderEditError, match=r"a wider copy of the int8 weight of \S*norm\S*linear \(and \d others\)"):
        build_engine(base("int8"), "shapes-st", tmp_path / "e", settings, progress=False)
    assert not list(tmp_path.iterdir())


def test_default_targets_are_those_that_compute_in_the_precision(base: Quantized, family: Family) -> None:
    pytest.importorskip("tensorrt_rtx")
    from slideredit_rt.engines import get_backend

    backend = get_backend("tensorrt-rtx")
    for precision, targets in (("fp8", ("sm89", "sm120")), ("nvfp4", ("sm120",)), ("int8", ("sm86", "sm89", "sm120"))):
        assert backend.precheck(family, base(precision), BuildSettings("tensorrt-rtx")).targets == targets


# Full width: FLUX with one block of each kind


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 546 million random bfloat16 parameters."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    shutil.copytree(resolve_base("shapes-kontext"), folder, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).to(torch.bfloat16)
    transformer.save_pretrained(folder / "transformer")
    return folder


def wide_adapter(base: Path, family: Family, kind: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    linears = {n: m for n, m in meta_transformer(base / "transformer").named_modules() if isinstance(m, nn.Linear)}

    def matrix(*size: int) -> Tensor:
        return 0.02 * torch.randn(size, generator=generator)

    pairs = {
        name: (matrix(16, m.in_features), matrix(m.out_features, 16))
        for name, m in linears.items()
        if family.targets(kind).fullmatch(name)  # type: ignore[arg-type]
    }
    adapter = load_adapter(f"shapes-{kind}", family)
    return dataclasses.replace(adapter, pairs=pairs, rank=16, source="random")


def wide_copy(base: Path, precision: str, family: Family) -> Path:
    copy = base.parent / precision
    if not copy.exists():
        layers = select_layers(family, meta_transformer(base / "transformer"), precision)
        quantize_base(base, copy, QuantizeSettings(precision), maxima=dict.fromkeys(layers, 8.0), progress=False)
    return copy


@pytest.mark.slow
def test_plans_of_full_width_projections_are_as_small_as_their_weights(wide: Path, family: Family, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sizes = {}
    for precision, target in ((None, "sm89"), ("fp8", "sm89"), ("int8", "sm86"), ("int4", "sm86"), ("nvfp4", "sm120")):
        base = wide if precision is None else wide_copy(wide, precision, family)
        options = TensorRTOptions(targets=(target,), resolution=256)
        settings = BuildSettings("tensorrt-rtx", dtype="bfloat16", batch=(1, 1, 4), options=options)
        out = tmp_path / f"{precision}"
        manifest = build_engine(base, wide_adapter(wide, family, "st"), out, settings, progress=False)
        sizes[precision or "bfloat16"] = manifest.files["model.engine"]["bytes"]
        shutil.rmtree(out)
    ratios = {name: round(size / sizes["bfloat16"], 3) for name, size in sizes.items()}
    sys.stdout.write(f"\nplans over bfloat16: {ratios}\n")
    assert ratios["fp8"] <= 0.6
    assert ratios["int8"] <= 0.75
    assert ratios["int4"] <= 0.6
    assert ratios["nvfp4"] <= 0.6


@pytest.mark.slow
def test_integer_weights_halve_a_step_on_the_cpu(wide: Path, family: Family, tmp_path: Path) -> None:
    seconds: dict[str | None, list[float]] = {}
    adapter = wide_adapter(wide, family, "st")
    sessions = {}
    for precision in (None, "int8", "int4"):
        base = wide if precision is None else wide_copy(wide, precision, family)
        manifest = build_engine(base, adapter, tmp_path / f"{precision}", progress=False)
        sessions[precision] = open_engine(tmp_path / f"{precision}", RunSettings(threads=1))[1]
    inputs = family.random_inputs(manifest.config, 1, 64, 512, torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 64, dtype=torch.bool)
    mask[:, :, :16] = True
    inputs |= {"alpha": torch.full((1, 1), 0.5), "token_mask": mask}
    for _ in range(4):
        for precision, session in sessions.items():
            started = time.perf_counter()
            session(inputs)
            seconds.setdefault(precision, []).append(time.perf_counter() - started)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    over = {name: round(best[name] / best[None], 3) for name in ("int8", "int4")}
    sys.stdout.write(f"\na step in float32 takes {best[None]:.2f} s on one thread; over it: {over}\n")
    assert over["int8"] <= 0.55
