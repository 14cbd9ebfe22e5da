"""Quantised bases: exact formats, what is written and loaded, sliders beside quantised linears, accuracy, refusals."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from slideredit_rt.adapters import Adapter, Fused, load_adapter, read_updates, save_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.bench.full_size import FULL_SIZES
from slideredit_rt.bench.quantized_accuracy import measure_accuracy
from slideredit_rt.checkpoint import fingerprint_base, meta_transformer
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import CALIBRATION_SEEDS
from slideredit_rt.evaluation.shapes import ShapesScenes
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family, get_family
from slideredit_rt.kernels import masked_lora_update, masked_lora_update_, quantized_linear, quantized_linear_reference
from slideredit_rt.modules import MaskedLoRAQuantizedLinear, SliderBackbone
from slideredit_rt.quantization import write
from slideredit_rt.quantization.calibrate import ActivationRun, measure_activations
from slideredit_rt.quantization.config import QuantizedLayer, describe_layers, read_layers
from slideredit_rt.quantization.linear import QuantizedLinear
from slideredit_rt.quantization.precisions import PRECISIONS, get_precision
from slideredit_rt.quantization.selection import select_layers
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base

WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"
precisions = pytest.mark.parametrize("precision", PRECISIONS)


def random_weight(n: int = 24, k: int = 256) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(4))


def linear_of(precision: str, weight: Tensor, bias: Tensor | None = None, amax: float = 4.0) -> QuantizedLinear:
    """A linear that holds a quantised weight."""
    form = PRECISIONS[precision]
    n, k = weight.shape
    linear = QuantizedLinear(k, n, precision, bias=bias is not None, activations=form.quantises_activations)
    for name, part in form.quantise(weight).items():
        setattr(linear, name, part)
    if form.quantises_activations:
        linear.input_scale = torch.tensor(form.input_scale(amax))
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias)
    return linear


def bits(module: torch.nn.Module) -> dict[str, Tensor]:
    return {n: b.reshape(-1).view(torch.uint8) for n, b in module.named_buffers()}


# Formats, computed by hand


def test_fp8_maps_the_largest_weight_of_each_channel_to_448() -> None:
    parts = PRECISIONS["fp8"].quantise(torch.tensor([[1.75, -3.5, 1.05, 0.0], [56.0, 0.0, 7.0, -3.5]]))
    assert parts["weight_scale"].tolist() == [2**-7, 0.125]
    # 1.05 · 128 = 134.4, between 128 and 144.
    assert parts["weight"].float().tolist() == [[224, -448, 128, 0], [448, 0, 56, -28]]


def test_int8_maps_the_largest_weight_of_each_channel_to_127() -> None:
    parts = PRECISIONS["int8"].quantise(torch.tensor([[127.0, -127.0, 2.4, 0.0], [5.0, 0.0, 3.0, -254.0]]))
    assert parts["weight_scale"].tolist() == [1, 2]
    assert parts["weight"].tolist() == [[127, -127, 2, 0], [2, 0, 2, -127]], "2.5 and 1.5 round to even"


@precisions
def test_engines_that_compute_in_bfloat16_have_the_same_scales(precision: str) -> None:
    form = PRECISIONS[precision]
    parts = form.quantise(random_weight())
    scales = [part.float() for name, part in parts.items() if name != "weight"]
    if form.quantises_activations:
        scales.append(torch.tensor(form.input_scale(3.7)))
    assert all(torch.equal(scale.bfloat16().float(), scale) for scale in scales)


def test_int4_packs_the_even_column_into_the_low_half_of_a_byte() -> None:
    weight = torch.zeros(1, 16)
    weight[0, :6] = torch.tensor([1.0, 2.0, -1.0, -7.0, 7.0, 3.4])
    parts = PRECISIONS["int4"].quantise(weight)
    assert parts["weight_scale"].tolist() == [[1]]
    assert parts["weight"][0, :4].tolist() == [0x21, 0x9F, 0x37, 0x00]


def test_nvfp4_rounds_ties_to_the_even_code() -> None:
    values = [6.0, -6.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, -0.75, 1.5, -3.0, 0.0, 0.5]
    codes = [7, 15, 0, 1, 2, 2, 4, 4, 6, 6, 7, 10, 3, 13, 0, 1]
    parts = PRECISIONS["nvfp4"].quantise(torch.tensor([values]) * 448)
    assert parts["weight_scale_2"].item() == 1
    assert parts["weight_scale"].float().tolist() == [[448]]
    packed = parts["weight"][0]
    assert torch.stack([packed & 15, packed >> 4], dim=1).flatten().tolist() == codes


def test_nvfp4_has_a_scale_of_its_own_for_16_inputs() -> None:
    weight = torch.cat([torch.full((1, 16), 2688.0), torch.full((1, 16), 6.0)], dim=1)
    parts = PRECISIONS["nvfp4"].quantise(weight)
    assert parts["weight_scale"].float().tolist() == [[448, 1]]
    assert torch.equal(PRECISIONS["nvfp4"].dequantise(parts), weight)


@precisions
def test_a_weight_of_zeros_and_one_with_tiny_blocks_give_finite_values(precision: str) -> None:
    form, weight = PRECISIONS[precision], random_weight()
    weight[3] = 0
    weight[5, :128] = 1e-30
    dequantised = form.dequantise(form.quantise(weight))
    assert dequantised.isfinite().all()
    assert (dequantised[3] == 0).all()
    for zeros in (torch.zeros(8, 256), torch.full((8, 256), 1e-42)):
        parts = form.quantise(zeros)
        assert all((part.float() > 0).all() for name, part in parts.items() if "scale" in name)
        assert form.dequantise(parts).abs().max() <= 1e-38


@precisions
def test_what_is_stored_has_the_layout_and_is_quantised_to_itself(precision: str) -> None:
    form = PRECISIONS[precision]
    for n, k in ((24, 256), (5, 48), (3, 1024)):
        parts = form.quantise(random_weight(n, k))
        layout = {name: (part.dtype, part.shape) for name, part in form.layout(n, k).items()}
        assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == layout
        once = form.dequantise(parts)
        twice = form.dequantise(form.quantise(once))
        assert (twice - once).abs().max() <= 1e-6 * once.abs().max()


@pytest.mark.parametrize(("precision", "largest"), [("fp8", 2**-4), ("int8", 0.5 / 127), ("int4", 0.5 / 7), ("nvfp4", 1 / 6)])
def test_no_weight_is_further_off_than_half_a_step_of_its_block(precision: str, largest: float) -> None:
    weight = random_weight()
    form = PRECISIONS[precision]
    error = (form.dequantise(form.quantise(weight)) - weight).abs()
    # Floating-point formats have coarser steps for larger values; the limits hold for the largest.
    assert (error <= largest * 1.02 * weight.abs().amax(dim=1, keepdim=True)).all()


def test_activations_are_clamped_and_share_the_static_scale() -> None:
    fp8 = PRECISIONS["fp8"]
    scale = torch.tensor(fp8.input_scale(224.0))  # twice the largest value of the calibration fits
    assert scale.item() == 1
    assert fp8.fake_quantise(torch.tensor([1000.0, -1e9, 17.0, 134.4, 0.0]), scale).tolist() == [448, -448, 17 - 1, 128, 0]
    assert fp8.input_scale(0.0) == 1
    nvfp4, x = PRECISIONS["nvfp4"], random_weight(3, 32)
    second = torch.tensor(nvfp4.input_scale(x.abs().max().item() / 2))
    assert torch.equal(nvfp4.fake_quantise(x, second), nvfp4.dequantise(nvfp4.quantise(x)))
    for name in ("int8", "int4"):
        assert not PRECISIONS[name].quantises_activations


def test_the_registry_knows_which_cards_compute_in_a_precision() -> None:
    runs = {
        name: [c for c in ("sm80", "sm86", "sm89", "sm90", "sm103", "sm121") if p.runs_on(c)] for name, p in PRECISIONS.items()
    }
    assert runs["fp8"] == ["sm89", "sm90", "sm103", "sm121"]
    assert runs["nvfp4"] == ["sm103", "sm121"]
    assert len(runs["int8"]) == len(runs["int4"]) == 6
    with pytest.raises(SliderEditError, match="unknown precision 'fp6'; known: fp8, int8, int4, nvfp4"):
        get_precision("fp6")


# Linears


@precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_linear_computes_in_float32_and_rounds_once(precision: str, dtype: torch.dtype) -> None:
    weight, bias, x = random_weight(), torch.randn(24), torch.randn(2, 5, 256).to(dtype)
    linear, form = linear_of(precision, weight, bias), PRECISIONS[precision]
    wide = x.float()
    if linear.input_scale is not None:
        wide = form.fake_quantise(wide, linear.input_scale)
        assert not torch.equal(wide, x.float())
    expected = torch.nn.functional.linear(wide, form.dequantise(form.quantise(weight)), bias).to(dtype)
    found = linear(x)
    assert (found.dtype, found.shape) == (dtype, (2, 5, 24))
    assert torch.equal(found, expected)
    assert not torch.equal(found, torch.nn.functional.linear(x.float(), weight, bias).to(dtype))


@precisions
def test_converting_or_moving_a_quantised_linear_keeps_its_bits(precision: str) -> None:
    linear = linear_of(precision, random_weight(), torch.randn(24))
    before = bits(linear)
    moved = copy.deepcopy(linear).to(torch.bfloat16)
    assert moved.bias is not None
    assert moved.bias.dtype == torch.bfloat16
    assert {n: b.tolist() for n, b in bits(moved).items()} == {n: b.tolist() for n, b in before.items()}
    assert {n: b.dtype for n, b in moved.named_buffers()} == {n: b.dtype for n, b in linear.named_buffers()}
    on_meta = copy.deepcopy(linear).to("meta")
    assert all(b.is_meta for b in on_meta.buffers())
    assert list(on_meta.state_dict()) == list(linear.state_dict())
    assert on_meta(torch.empty(2, 3, 256, device="meta")).shape == (2, 3, 24)


@precisions
def test_a_quantised_linear_is_one_node_of_a_trace(precision: str) -> None:
    linear = linear_of(precision, random_weight(), torch.randn(24))
    x = torch.randn(2, 5, 256)
    traced = torch.export.export(linear, (x,), dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("rows")},))
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_function" and "sym" not in str(node.target)]
    assert called == ["slideredit.quantized_linear.default"]
    assert torch.equal(traced.module()(x), linear(x))


@precisions
def test_gradients_pass_through_a_quantised_linear(precision: str) -> None:
    linear, x = linear_of(precision, random_weight()), torch.randn(3, 256, requires_grad=True)
    linear(x).sum().backward()
    form = PRECISIONS[precision]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, form.dequantise(form.quantise(random_weight())).sum(0).expand(3, -1))


def test_parts_that_do_not_fit_are_refused() -> None:
    linear, x = linear_of("int8", random_weight()), torch.randn(2, 256)
    with pytest.raises(SliderEditError, match=r"an int8 projection of x with shape \(2, 128\) needs torch.int8 \(24, 128\)"):
        linear(x[:, :128])
    scale = torch.ones(24, 16).to(torch.float8_e4m3fn)
    with pytest.raises(SliderEditError, match="nvfp4 needs one"):
        quantized_linear(x, torch.zeros(24, 128, dtype=torch.uint8), scale, None, None, None, "nvfp4")
    with pytest.raises(SliderEditError, match=r"weight_scale is torch.float32 \(1,\); an int8 projection"):
        quantized_linear(x, linear.weight, linear.weight_scale[:1], None, None, None, "int8")
    with pytest.raises(SliderEditError, match=r"input_scale is 1\.0, but int8 lacks one"):
        quantized_linear(x, linear.weight, linear.weight_scale, None, torch.tensor(1.0), None, "int8")


def test_the_update_keeps_the_bits_of_rows_whose_scale_is_zero() -> None:
    g = torch.Generator().manual_seed(7)
    y, x = torch.randn(2, 6, 24, generator=g).bfloat16(), torch.randn(2, 6, 256, generator=g).bfloat16()
    a, b = torch.randn(4, 256, generator=g), torch.randn(24, 4, generator=g)
    scale = torch.tensor([0.0, 1.0, 0.0, -0.5, 2.0, 0.0]).expand(2, -1).contiguous()
    y[:, 2] = torch.nan
    found = masked_lora_update(y, x, a, b, scale)
    for row in (0, 2, 5):
        assert torch.equal(found[:, row].view(torch.int16), y[:, row].view(torch.int16))
    rest = [1, 3, 4]
    exact = y.double() + scale.double()[..., None] * (x.double() @ a.double().T @ b.double().T)
    assert ((found.double() - exact)[:, rest].abs() <= 2**-8 * exact[:, rest].abs()).all()
    assert torch.equal(masked_lora_update_(y.clone(), x, a, b, scale)[:, rest], found[:, rest])
    wide = masked_lora_update(y.mT.contiguous().mT, x, a, b, scale)
    assert torch.equal(wide[:, rest], found[:, rest]), "y may have any strides"


@pytest.mark.parametrize("members", [None, 2])
def test_the_update_has_exact_gradients(members: int | None) -> None:
    g = torch.Generator().manual_seed(8)
    shapes = ((2, 3, 5), (2, 3, 7), (4, 7), (5, 4))
    arguments = [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]
    scale = torch.rand((2, 3, *([members] if members else [])), generator=g)
    scale[0, 1] = 0
    assert torch.autograd.gradcheck(lambda y, x, a, b: masked_lora_update(y, x, a, b, scale), arguments)


def test_fp8_weights_can_do_without_quantised_activations() -> None:
    weight, x = random_weight(), torch.randn(3, 256)
    linear = QuantizedLinear(256, 24, "fp8", bias=False)
    for name, part in PRECISIONS["fp8"].quantise(weight).items():
        setattr(linear, name, part)
    assert linear.input_scale is None
    torch.testing.assert_close(linear(x), x @ PRECISIONS["fp8"].dequantise(dict(linear.named_buffers())).T)


# Which linears


def _count(layers: dict[str, QuantizedLayer]) -> dict[tuple[str, bool], int]:
    return dict(Counter((layer.precision, layer.activations) for layer in layers.values()))


def test_flux_quantises_projections_and_modulation_and_keeps_the_rest(family: Family) -> None:
    with init_empty_weights():
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    layers = select_layers(family, transformer, "nvfp4")
    # 19 blocks of 12 and 38 of 5 projections; 2 and 1 modulation linears a block.
    assert _count(layers) == {("nvfp4", True): 418, ("int8", False): 76}
    assert _count(select_layers(family, transformer, "int4")) == {("int4", False): 418, ("int8", False): 76}
    linears = [name for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    kept = {name.partition(".")[0] for name in linears if name not in layers}
    assert kept == {"x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"}


def test_qwen_keeps_its_first_two_and_last_two_blocks() -> None:
    with init_empty_weights():
        transformer = QwenImageTransformer2DModel()
    layers = select_layers(get_family("qwen_image_edit"), transformer, "fp8")
    assert {int(name.split(".")[1]) for name in layers} == set(range(2, 58))
    assert _count(layers) == {("fp8", True): 56 * 12, ("int8", False): 56 * 2}


def test_flux2_quantises_projections_and_the_modulation_that_its_blocks_share() -> None:
    for name, projections in (("flux2_klein_4b", 100), ("flux2_klein_9b", 144)):
        with init_empty_weights():
            transformer = Flux2Transformer2DModel(**FULL_SIZES[name].full)
        layers = select_layers(get_family("flux2"), transformer, "nvfp4")
        assert _count(layers) == {("nvfp4", True): projections, ("int8", False): 3}
        linears = [name for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
        kept = {name.partition(".")[0] for name in linears if name not in layers}
        assert kept == {"x_embedder", "context_embedder", "time_guidance_embed", "norm_out", "proj_out"}


def test_keep_leaves_linears_out_and_must_match_one(family: Family) -> None:
    transformer = meta_transformer(resolve_base("shapes-kontext") / "transformer")
    layers = select_layers(family, transformer, "int8", ["transformer_blocks.0.*", "*.to_k"])
    assert layers.keys() == {
        name
        for name in select_layers(family, transformer, "int8")
        if ".to_k" not in name and not name.startswith("transformer_blocks.0.")
    }
    with pytest.raises(SliderEditError, match="matches no linear of this flux_kontext transformer"):
        select_layers(family, transformer, "int8", ["*.to_z"])
    with pytest.raises(SliderEditError, match="no linear is left"):
        select_layers(family, transformer, "int8", ["*"])


# Bases


@pytest.fixture(scope="module")
def maxima(family: Family) -> dict[str, float]:
    """The largest inputs of every projection in a calibration of the usual kind."""
    base = resolve_base("shapes-kontext")
    layers = select_layers(family, meta_transformer(base / "transformer"), "fp8")
    run = ActivationRun(("shapes-st", "shapes-gst"), cases=2, steps=6)
    return measure_activations(family, base, [n for n, layer in layers.items() if layer.activations], run, progress=False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, maxima: dict[str, float]) -> dict[str, Path]:
    """The embedded base in every precision."""
    root = tmp_path_factory.mktemp("quantised")
    for name in PRECISIONS:
        quantize_base("shapes-kontext", root / name, QuantizeSettings(name), maxima=maxima, progress=False)
    return {name: root / name for name in PRECISIONS}


def weights_of(base: Path) -> dict[str, Tensor]:
    return load_file(base / "transformer" / WEIGHTS)


@precisions
def test_a_quantised_base_holds_what_the_precision_makes_of_the_original(
    bases: dict[str, Path], maxima: dict[str, float], precision: str
) -> None:
    original, found = weights_of(resolve_base("shapes-kontext")), weights_of(bases[precision])
    layers, expected = read_layers(bases[precision] / "transformer"), {}
    for name, tensor in original.items():
        module = name.removesuffix(".weight")
        if module not in layers:
            expected[name] = tensor
            continue
        form = PRECISIONS[layers[module].precision]
        expected |= {f"{module}.{part}": value for part, value in form.quantise(tensor).items()}
        if layers[module].activations:
            expected[f"{module}.input_scale"] = torch.tensor(form.input_scale(maxima[module]))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@precisions
def test_its_configuration_names_each_linear_as_modelopt_does(bases: dict[str, Path], precision: str) -> None:
    config = json.loads((bases[precision] / "transformer" / "config.json").read_text())
    quantisation = config.pop("quantization_config")
    assert config == json.loads((resolve_base("shapes-kontext") / "transformer" / "config.json").read_text())
    assert (quantisation["quant_method"], quantisation["precision"]) == ("modelopt", precision)
    assert len(quantisation["quantized_layers"]) == 46
    assert quantisation["quantized_layers"][TO_Q] == {"quant_algo": PRECISIONS[precision].algorithm}
    assert quantisation["quant_algo"] == ("W8A16" if precision == "int8" else "MIXED_PRECISION")


def test_everything_else_is_that_of_the_original_and_its_weights_are_linked(bases: dict[str, Path]) -> None:
    base, copy_ = resolve_base("shapes-kontext"), bases["fp8"]
    assert fingerprint_base(copy_, skip=("transformer",)) == fingerprint_base(base, skip=("transformer",))
    for file in base.rglob("*.safetensors"):
        place = copy_ / file.relative_to(base)
        assert place.samefile(file) == ("transformer" not in file.parts)
    assert not (copy_ / "scheduler" / "scheduler_config.json").samefile(base / "scheduler" / "scheduler_config.json")


@precisions
@torch.no_grad()
def test_sliders_act_beside_a_quantised_base_and_off_they_change_no_bit(
    bases: dict[str, Path], family: Family, precision: str
) -> None:
    transformer = family.load_pipeline(bases[precision]).transformer
    frozen = SliderBackbone(family, transformer, None)
    keys = list(transformer.state_dict())
    inputs = example_inputs(
        SliderBackbone(family, meta_transformer(bases[precision] / "transformer"), load_adapter("shapes-gst")),
        dict(transformer.config),
        2,
        24,
        128,
        1,
    )
    before = frozen({k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")})
    adapter = load_adapter("shapes-gst", family)
    backbone = SliderBackbone(family, transformer, adapter)
    assert sum(isinstance(m, MaskedLoRAQuantizedLinear) for m in transformer.modules()) == len(adapter.pairs)
    assert set(keys) <= set(transformer.state_dict())
    assert torch.equal(backbone(inputs | {"alpha": torch.zeros_like(inputs["alpha"])}), before)
    assert (backbone(inputs | {"alpha": torch.ones_like(inputs["alpha"])}) - before).abs().max() > 0.01
    backbone.remove()
    assert list(transformer.state_dict()) == keys
    assert torch.equal(frozen({k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")}), before)
    assert type(transformer.get_submodule(TO_Q)) is QuantizedLinear


def test_the_low_rank_update_reads_the_unquantised_rows(bases: dict[str, Path], family: Family) -> None:
    transformer = family.load_pipeline(bases["fp8"]).transformer
    backbone = SliderBackbone(family, transformer, load_adapter("shapes-gst", family))
    module = backbone.adapted[TO_Q]
    x = torch.randn(1, 4, 128) * 100  # far beyond the calibrated range
    backbone.set_scales(torch.ones(1, 2 + 4), text_rows=2, image_rows=4)
    assert isinstance(module, MaskedLoRAQuantizedLinear)
    frozen = quantized_linear_reference(x, module.weight, module.weight_scale, None, module.input_scale, module.bias, "fp8")
    with torch.no_grad():
        update = module(x) - frozen
        torch.testing.assert_close(update, x @ module.lora_A.T @ module.lora_B.T, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", ["st", "gst"])
def test_steps_and_images_reach_the_accuracy_marks(bases: dict[str, Path], kind: str) -> None:
    for name, accuracy in measure_accuracy(bases, kind, scenes=2, steps=6).items():
        limits = PRECISIONS[name].limits
        assert limits.step_rms / 20 < accuracy.step_rms <= limits.step_rms, (name, accuracy)
        assert limits.psnr <= accuracy.worst_psnr < 90, (name, accuracy)


def test_a_bfloat16_editor_edits_with_a_quantised_base(bases: dict[str, Path], scene: Any) -> None:
    editor = SliderEditor.from_pretrained(bases["nvfp4"], "shapes-st", dtype=torch.bfloat16)
    prepared = editor.prepare(scene, ["make the circle red"])
    low, high = editor.render_tensor(prepared, [[0.0], [1.0]], steps=4)
    assert (high - low).abs().max() > 0.2


# Permanent LoRAs


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of a projection and of modulation."""
    g = torch.Generator().manual_seed(3)
    pairs = {
        TO_Q: (torch.randn(4, 128, generator=g), torch.randn(128, 4, generator=g) / 50),
        "transformer_blocks.0.norm1.linear": (torch.randn(4, 128, generator=g), torch.randn(768, 4, generator=g) / 50),
        "proj_out": (torch.randn(4, 128, generator=g), torch.randn(64, 4, generator=g) / 50),
    }
    path = tmp_path_factory.mktemp("lora") / "few=steps.safetensors"
    save_adapter(Adapter("flux_kontext", "gst", 4, pairs, "few-steps"), path)
    return path


def test_a_lora_is_fused_before_weights_are_quantised(tmp_path: Path, lora: Path, family: Family) -> None:
    fuse = (Fused(lora, 0.5), Fused(lora, 0.25))
    report = quantize_base("shapes-kontext", tmp_path / "out", QuantizeSettings("int8", fuse=fuse), progress=False)
    assert report.fused == 3
    original, found, form = weights_of(resolve_base("shapes-kontext")), weights_of(tmp_path / "out"), PRECISIONS["int8"]
    for module, (a, b) in load_adapter(lora, family).pairs.items():
        wanted = original[f"{module}.weight"] + 0.75 * b @ a
        assert (wanted - original[f"{module}.weight"]).abs().max() > 0.05
        parts = {p: found[f"{module}.{p}"] for p in ("weight", "weight_scale") if f"{module}.{p}" in found}
        stored = form.dequantise(parts) if "weight_scale" in parts else parts["weight"]
        torch.testing.assert_close(
            stored, form.dequantise(form.quantise(wanted)) if "weight_scale" in parts else wanted, rtol=0, atol=2e-2
        )
        assert (stored - wanted).abs().max() <= wanted.abs().max() / 127
    untouched = "transformer_blocks.1.attn.to_q.weight"
    assert torch.equal(found[untouched], form.quantise(original[untouched])["weight"])


def test_calibration_runs_with_the_fused_lora(family: Family, lora: Path) -> None:
    base, run = resolve_base("shapes-kontext"), ActivationRun(cases=1, steps=2)
    updates = read_updates([Fused(lora, 20.0)], family, meta_transformer(base / "transformer"))
    ends = ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.ff.net.0.proj"]
    plain = measure_activations(family, base, ends, run, progress=False)
    fused = measure_activations(family, base, ends, run, updates, progress=False)
    assert fused[ends[1]] > 2 * plain[ends[1]]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must be refused in one sentence."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("slideredit-rt: ")
    assert error.count("\n") == 1
    return error


def test_loras_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: Family) -> None:
    command = ("quantize", "--base", "shapes-kontext", "--precision", "int8", "--out", tmp_path / "out", "--quiet", "--fuse")
    a, b = torch.ones(2, 128), torch.ones(128, 2)

    def saved(**pairs: tuple[Tensor, Tensor]) -> Path:
        named = {name.replace("__", "."): pair for name, pair in pairs.items()}
        tensors = {
            f"transformer.{m}.lora_{p}.weight": t.clone() for m, pair in named.items() for p, t in zip("AB", pair, strict=True)
        }
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(tensors, tmp_path / "lora.safetensors")
        return tmp_path / "lora.safetensors"

    q0, q9 = "transformer_blocks__0__attn__to_q", "transformer_blocks__9__attn__to_q"
    assert "updates no linear" in refused(capsys, *command, saved(nothing__here=(a, b)))
    assert "for transformer_blocks.9.attn.to_q, which this base lacks" in refused(
        capsys, *command, saved(**{q0: (a, b), q9: (a, b)})
    )
    wide = (torch.ones(2, 256), b)
    assert "which this base has with 128×128 weights" in refused(capsys, *command, saved(**{q0: wide}))
    assert "is a bank" in refused(capsys, *command, "shapes-concepts")
    assert "does not exist" in refused(capsys, *command, tmp_path / "none.safetensors")
    infinite = f"{saved(**{q0: (a * 1e38, b)})}=1e30"
    assert "holds NaN or infinity after fusing" in refused(capsys, *command, infinite)
    for text, message in (
        (f"{tmp_path}/x=much", "has scale 'much'"),
        ("shapes-st=0", "has scale 0"),
        ("shapes-st=inf", "has scale inf"),
    ):
        assert message in refused(capsys, *command, text)
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]


# Calibration


def test_calibration_keeps_the_largest_input_over_steps_strengths_and_adapters(family: Family) -> None:
    base, names = resolve_base("shapes-kontext"), [TO_Q, "single_transformer_blocks.2.proj_out"]
    seen: dict[str, list[float]] = {name: [] for name in names}
    for kind in ("st", "gst"):
        editor = SliderEditor.from_pretrained(base, f"shapes-{kind}")
        engine: Any = editor.engine
        for name in names:
            module = engine.backbone.transformer.get_submodule(name)
            module.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0].abs().max().item()))
        for case in ShapesScenes(seeds=CALIBRATION_SEEDS).cases("bench", 2, 1):
            prepared = editor.prepare(case.image, case.instructions, prompt=case.prompt, seed=case.seed)
            for strength in (0.0, 0.5, 1.0, 1.5):
                editor.render_tensor(prepared, [[strength]], steps=3)
    found = measure_activations(
        family, base, names, ActivationRun(("shapes-st", "shapes-gst"), cases=2, steps=3), progress=False
    )
    assert all(len(values) == 2 * 2 * 4 * 3 for values in seen.values())
    assert found == pytest.approx({name: max(values) for name, values in seen.items()}, rel=1e-4)


@pytest.fixture
def own(tmp_path: Path, scene: Any) -> tuple[Path, Path]:
    """A folder with one image, and a file of edits with one and two instructions."""
    (tmp_path / "images").mkdir()
    scene.save(tmp_path / "images" / "scene.png")
    edits = [["make the circle red"], ["make the circle red", "make the square blue"]]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps({"instructions": edit}) + "\n" for edit in edits))
    return tmp_path / "images", tmp_path / "edits.jsonl"


@pytest.mark.parametrize("kind", ["st", "gst"])
def test_own_images_calibrate_any_base(
    own: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    shutil.copytree(resolve_base("shapes-kontext"), tmp_path / "base")
    command = (
        "quantize",
        "--base",
        tmp_path / "base",
        "--precision",
        "fp8",
        "--out",
        tmp_path / "out",
        "--steps",
        2,
        "--quiet",
    )
    assert "must be calibrated on edits of your own" in refused(capsys, *command)
    given = ("--calibrate", own[0], "--prompts", own[1], "--adapter", f"shapes-{kind}", "--json")
    assert main([str(a) for a in (*command, *given)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["precision"], report["layers"]) == ("fp8", {"FP8": 39, "W8A16": 7})
    scales = [t.item() for name, t in weights_of(tmp_path / "out").items() if name.endswith("input_scale")]
    assert len(scales) == 39
    assert all(0.001 < scale * 448 < 2000 for scale in scales)


def test_calibration_images_that_cannot_be_used_are_refused(
    own: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    (images, prompts), out = own, tmp_path / "out"
    command = ("quantize", "--base", "shapes-kontext", "--precision", "fp8", "--out", out, "--quiet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"\x89PNG")
    for folder, message in (("empty", "contains no images"), ("none", "cannot be read"), ("damaged", "a.png")):
        assert message in refused(capsys, *command, "--calibrate", tmp_path / folder, "--prompts", prompts)
    assert "prompts file" in refused(capsys, *command, "--calibrate", images, "--prompts", tmp_path / "none.jsonl")
    assert "give both" in refused(capsys, *command, "--calibrate", images)
    assert "numbers of at least 1" in refused(capsys, *command, "--cases", 0)
    assert "is a bank" in refused(capsys, *command, "--adapter", "shapes-concepts")
    weights = ("quantize", "--base", "shapes-kontext", "--precision", "int4", "--out", out)
    assert "int4 does not; leave it out" in refused(capsys, *weights, "--calibrate", images, "--prompts", prompts)
    assert {p.name for p in set(tmp_path.rglob("*")) - set(before)} == {"empty", "damaged", "a.png"}


def test_a_linear_that_no_edit_runs_cannot_be_calibrated(family: Family) -> None:
    base, run = resolve_base("shapes-kontext"), ActivationRun(cases=1, steps=1)
    # A list of modules, which is not called itself.
    with pytest.raises(SliderEditError, match=r"the inputs of transformer_blocks\.0\.attn\.to_out were not seen"):
        measure_activations(family, base, ["transformer_blocks.0.attn.to_out"], run, progress=False)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    shutil.copytree(resolve_base("shapes-kontext"), tmp_path / "base")
    changed = weights_of(tmp_path / "base")
    changed["transformer_blocks.0.norm1.linear.weight"][0] = torch.inf
    save_file(changed, tmp_path / "base" / "transformer" / WEIGHTS)
    with pytest.raises(SliderEditError, match=r"norm1\.linear\.weight holds NaN or infinity; download the base again"):
        quantize_base(tmp_path / "base", tmp_path / "out", QuantizeSettings("int8"), progress=False)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


# What people see


def test_inspect_and_adapter_show_understand_a_quantised_base(
    bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(bases["int4"]), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["precision"], report["layers"], report["kept"]) == ("int4", {"W4A16": 39, "W8A16": 7}, 10)
    assert sum(report["stored"].values()) == sum(t.nbytes for t in weights_of(bases["int4"]).values())
    assert main(["inspect", str(bases["nvfp4"])]) == 0
    assert "layers     39 NVFP4, 7 W8A16; 10 linears kept" in capsys.readouterr().out
    assert main(["inspect", str(resolve_base("shapes-kontext"))]) == 0
    assert "precision  not quantised" in capsys.readouterr().out
    assert "--vram is for engines" in refused(capsys, "inspect", bases["fp8"], "--vram", 24)
    assert main(["adapter", "show", "shapes-gst", "--base", str(bases["fp8"]), "--json"]) == 0
    match = json.loads(capsys.readouterr().out)["base"]
    assert (len(match["matched"]), match["missing"], match["unexpected"], match["mismatched"]) == (33, [], [], [])


def test_the_command_reports_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["quantize", "--base", "shapes-kontext", "--precision", "int8", "--out", str(out), "--keep", "*norm*"]
    assert main([*command, "--fuse", "shapes-gst=0.5"]) == 0
    captured = capsys.readouterr()
    assert "39 W8A16 linears, 17 kept" in captured.out
    assert "fused into 33 linears" in captured.out
    assert "quantize" in captured.err, "a progress bar"
    assert "exists already" in refused(capsys, *command)
    before = (out / "transformer" / WEIGHTS).read_bytes()
    assert main([*command, "--overwrite", "--quiet"]) == 0
    assert (out / "transformer" / WEIGHTS).read_bytes() != before
    for holder in (out, out.parent):
        assert "which is read; choose another folder with --out" in refused(
            capsys, "quantize", "--base", out, "--precision", "int8", "--out", holder, "--overwrite"
        )
    assert out.exists()
    assert "is quantised already (int8)" in refused(
        capsys, "quantize", "--base", out, "--precision", "int8", "--out", tmp_path / "other"
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activations", [False, True])
def test_a_configuration_is_read_as_it_was_written(tmp_path: Path, precision: str, activations: bool) -> None:
    form = PRECISIONS[precision]
    if (not form.quantises_activations) if activations else (form.weight_only_algorithm is None):
        pytest.skip("not offered")
    layers = {"a": QuantizedLayer(precision, activations), "b": QuantizedLayer("int8")}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": describe_layers(layers, precision)}))
    assert read_layers(tmp_path) == layers


# Refusals


def set_quantisation(base: Path, value: Any) -> None:
    config = base / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": value}))


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("bitsandbytes_4bit", "NF4 and LLM.int8() need bitsandbytes"),
        ("gguf", "GGUF blocks are not read"),
        ("nunchaku", "Nunchaku's layout"),
        ("modelopt", "in a form that cannot be used here"),
        ("quanto", "in a form that cannot be used here"),
    ],
)
def test_other_methods_are_refused_with_what_to_do_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, hint: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(resolve_base("shapes-kontext"), base)
    set_quantisation(base, {"quant_method": method})
    for command in (
        ("quantize", "--precision", "int8", "--out", tmp_path / "out", "--base", base),
        ("build", "--adapter", "shapes-st", "--out", tmp_path / "out", "--quiet", "--base", base),
        ("inspect", base),
    ):
        error = refused(capsys, *command)
        assert f"is quantised ({method})" in error
        assert hint in error
        assert "slideredit-rt quantize" in error
    with pytest.raises(SliderEditError, match="is quantised"):
        SliderEditor.from_pretrained(base, "shapes-st")


@pytest.mark.parametrize(
    "name", ["flux1-kontext-dev-Q4_K_M.gguf", "svdq-int4_r32-flux.1-kontext-dev.safetensors", "flux.safetensors"]
)
def test_a_single_file_is_not_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    error = refused(capsys, "build", "--base", tmp_path / name, "--out", tmp_path / "out")
    assert "is a single file, not a folder" in error
    assert ("comes closest" in error) == (name != "flux.safetensors")


def change_weights(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(base: Path) -> None:
        tensors = weights_of(base)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, base / "transformer" / WEIGHTS)

    return damage


def change_layers(**entries: Any) -> Callable[[Path], None]:
    def damage(base: Path) -> None:
        layers = {name: {"quant_algo": layer.algorithm} for name, layer in read_layers(base / "transformer").items()}
        described = describe_layers(read_layers(base / "transformer"), "fp8")
        set_quantisation(base, described | {"quantized_layers": layers | {k.replace("__", "."): v for k, v in entries.items()}})

    return damage


DAMAGE = {
    "a scale of 0": (change_weights(f"{TO_Q}.weight_scale", lambda t: t * (torch.arange(128) > 0)), "a scale of 0 in"),
    "a negative scale": (change_weights(f"{TO_Q}.input_scale", lambda t: -t), "a scale of -"),
    "a scale of NaN": (change_weights(f"{TO_Q}.weight_scale", lambda t: t * math.nan), "a scale of nan in"),
    "an infinite scale": (change_weights(f"{TO_Q}.input_scale", lambda t: t * math.inf), "a scale of inf in"),
    "too few scales": (change_weights(f"{TO_Q}.weight_scale", lambda t: t[:1]), "with shape [1]"),
    "scales in 16 bits": (change_weights(f"{TO_Q}.weight_scale", Tensor.bfloat16), "as torch.bfloat16, but fp8 needs"),
    "a weight in 16 bits": (change_weights(f"{TO_Q}.weight", Tensor.bfloat16), "as torch.bfloat16, but fp8 needs"),
    "an unknown algorithm": (change_layers(x_embedder={"quant_algo": "FP6"}), "in the unknown quant_algo"),
    "no algorithm": (change_layers(x_embedder=8), "in the unknown quant_algo"),
    "an unknown linear": (change_layers(transformer_blocks__9__to_q={"quant_algo": "FP8"}), "which is not a linear"),
    "a linear without parts": (change_layers(x_embedder={"quant_algo": "FP8"}), "lacks the tensor x_embedder.weight_scale"),
    "an entry that is not an object": (lambda base: set_quantisation(base, [1]), "is quantised"),
    "no layers": (lambda base: set_quantisation(base, {"quant_method": "modelopt", "quantized_layers": {}}), "is quantised"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_quantised_base_is_refused(bases: dict[str, Path], tmp_path: Path, damage: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["fp8"], base)
    change, message = DAMAGE[damage]
    change(base)
    with pytest.raises(SliderEditError) as error:
        SliderEditor.from_pretrained(base, "shapes-st")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_float8_already_are_refused(tmp_path: Path) -> None:
    shutil.copytree(resolve_base("shapes-kontext"), tmp_path / "base")
    tensors = weights_of(tmp_path / "base")
    tensors[f"{TO_Q}.weight"] = tensors[f"{TO_Q}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "base" / "transformer" / WEIGHTS)
    with pytest.raises(SliderEditError, match=r"stores transformer_blocks.0.attn.to_q.weight as torch.float8_e4m3fn"):
        quantize_base(tmp_path / "base", tmp_path / "out", QuantizeSettings("int8"), progress=False)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(write, "read_tensor", full)
        with pytest.raises(SliderEditError, match="No space left on device"):
            quantize_base("shapes-kontext", tmp_path / "out", QuantizeSettings("int8"), progress=False)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**6))
    with pytest.raises(SliderEditError, match=r"take 0.0 GB, but .* has 0.0 GB free"):
        quantize_base("shapes-kontext", tmp_path / "out", QuantizeSettings("int8"), progress=False)
    assert not list(tmp_path.iterdir())


def test_shards_have_a_limit_and_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    monkeypatch.setattr(write, "SHARD_BYTES", 900_000)
    quantize_base("shapes-kontext", tmp_path / "out", QuantizeSettings("int8"), progress=False)
    folder = tmp_path / "out" / "transformer"
    shards = sorted(folder.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"diffusion_pytorch_model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert all(shard.stat().st_size < 950_000 for shard in shards)
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    found = {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["weight_map"] == found
    monkeypatch.undo()
    quantize_base("shapes-kontext", tmp_path / "whole", QuantizeSettings("int8"), progress=False)
    whole = weights_of(tmp_path / "whole")
    state = family.load_pipeline(tmp_path / "out").transformer.state_dict()
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


KILLED = """
import sys, time
from pathlib import Path
from slideredit_rt.quantization import write
read = write.read_tensor
def slow(place):
    print("reading", flush=True)
    time.sleep(0.2)
    return read(place)
write.read_tensor = slow
write.quantize_base("shapes-kontext", Path(sys.argv[1]), write.QuantizeSettings("int8"), progress=False)
"""


def test_a_killed_run_leaves_nothing_that_loads_and_the_next_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline() == b"reading\n"
    time.sleep(0.3)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1, "the temporary folder of the killed run"
    quantize_base("shapes-kontext", out, QuantizeSettings("int8"), progress=False)
    assert list(tmp_path.iterdir()) == [out]


# The full size


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """For gigabytes: gone after the test, where pytest keeps the folders of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def full_size_base(folder: Path) -> None:
    """A base with a transformer of 11.9B random bfloat16 weights, all of which lie in the same 400 MB of one file."""
    shutil.copytree(resolve_base("shapes-kontext"), folder)
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    with init_empty_weights():
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    transformer.save_config(folder / "transformer")
    header, random = {}, torch.randn(200_000_000, generator=torch.Generator().manual_seed(6)).mul_(0.02).bfloat16()
    for index, (name, tensor) in enumerate(transformer.state_dict().items()):
        start = 2 * 4096 * (index % 1000)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, start + 2 * tensor.numel()]}
    raw = json.dumps(header).encode()
    with (folder / "transformer" / WEIGHTS).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.write(random.view(torch.uint8).numpy().data)


FULL_SIZE = """
import json, resource, sys, time
from pathlib import Path
from slideredit_rt.checkpoint import meta_transformer
from slideredit_rt.families import get_family
from slideredit_rt.quantization.selection import select_layers
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base
base, out, precision = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
maxima = dict.fromkeys(select_layers(get_family("flux_kontext"), meta_transformer(base / "transformer"), precision), 8.0)
started = time.perf_counter()
report = quantize_base(base, out, QuantizeSettings(precision), maxima=maxima, progress=False)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "bytes": report.transformer_bytes, "source": report.source_bytes}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "gigabytes"), [("fp8", 12.5), ("int8", 15), ("int4", 9), ("nvfp4", 9)])
def test_the_full_12b_transformer_is_quantised_in_15_minutes_and_4_gb(
    scratch: Path, precision: str, gigabytes: float, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.disk_usage(scratch).free < 16 * 2**30:
        pytest.skip("needs 16 GiB of free disk")
    full_size_base(scratch / "base")
    # A process of its own: its peak memory is that of the quantisation.
    run = subprocess.run(
        [sys.executable, "-c", FULL_SIZE, scratch / "base", scratch / "out", precision],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    figures = json.loads(run.stdout.splitlines()[-1])
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{precision}: {figures['seconds'] / 60:.1f} min, peak {figures['peak'] / 1e9:.2f} GB, "
            f"{figures['source'] / 1e9:.1f} → {figures['bytes'] / 1e9:.2f} GB"
        )
    assert figures["source"] > 23.5e9
    assert figures["seconds"] < 15 * 60
    assert figures["peak"] < 4e9
    assert figures["bytes"] < gigabytes * 1e9
    layers = read_layers(scratch / "out" / "transformer")
    assert len(layers) == 494
    shards = list((scratch / "out" / "transformer").glob("*.safetensors"))
    assert all(shard.stat().st_size < 4.01e9 for shard in shards)
