"""Precisions of weights: formats computed by hand, and linears that hold quantised weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.kernels import masked_lora_update, masked_lora_update_, quantized_linear
from slideredit_rt.quantization.linear import QuantizedLinear
from slideredit_rt.quantization.precisions import PRECISIONS, get_precision

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
