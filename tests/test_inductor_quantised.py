"""Quantised bases on Inductor: eager's numbers, one rounding for projections of the same rows, no compilation per setting.

What dynamo captures is run as it is, except where a test says that it compiles C++.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from packaging.version import Version
from test_precisions import linear_of
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from slideredit_rt.adapters import Adapter, bank_adapters, load_adapter, save_adapter
from slideredit_rt.engines import BuildSettings, inductor, open_engine
from slideredit_rt.engines.inductor import Inductor
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.engines.quantised import (
    DequantisedLinear,
    FP8Linear,
    ShareEqualNodes,
    UpdatedLinear,
    prepare_quantised,
    share_input_scales,
)
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family
from slideredit_rt.modules import CallPair, MaskedLoRAQuantizedLinear, RowScales, SliderBackbone
from slideredit_rt.quantization.linear import quantized_linears
from slideredit_rt.quantization.loading import load_transformer
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base
from slideredit_rt.settings import RunSettings

PRECISIONS = ("fp8", "int8", "int4")
# Another order of the sums moves some activations to the next FP8 value, which counts as much as the quantisation itself.
LIMITS = {"fp8": 3e-2, "int8": 1e-5, "int4": 1e-5}
SIZES = (2, 8, 16)
precisions = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantised")
    for precision in PRECISIONS:
        quantize_base("shapes-kontext", root / precision, QuantizeSettings(precision), progress=False)
    return {precision: root / precision for precision in PRECISIONS}


def reference(family: Family, base: Path, adapter: Adapter | None, dtype: torch.dtype = torch.float32) -> SliderBackbone:
    """The eager backbone of the same quantised base."""
    backbone = SliderBackbone(family, load_transformer(base / "transformer", dtype), adapter)
    return backbone.to(dtype).eval().requires_grad_(False)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def two(family: Family) -> list[Adapter]:
    one = load_adapter("shapes-gst", family)
    # The second member is negative and twice as strong, so that a swap shows.
    return [one, dataclasses.replace(one, pairs={name: (a, -2 * b) for name, (a, b) in one.pairs.items()})]


@pytest.mark.usefixtures("as_traced")
@precisions
def test_engine_agrees_with_the_eager_reference_and_twelve_settings_compile_nothing(
    precision: str, kind: str, bases: dict[str, Path], family: Family, tmp_path: Path
) -> None:
    build_engine(bases[precision], f"shapes-{kind}", tmp_path / "e", BuildSettings("inductor"), progress=False)
    manifest, engine = open_engine(tmp_path / "e")
    assert (manifest.lowering, manifest.precision) == ("operator", precision)
    assert set(manifest.quantised) == {precision, "int8"}
    eager = reference(family, bases[precision], load_adapter(f"shapes-{kind}", family))
    engine(example_inputs(eager, manifest.config, *SIZES, 2))
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    errors = []
    for seed in range(12):
        inputs = example_inputs(eager, manifest.config, *SIZES, 1 + seed % 4, seed=seed)
        if seed % 5 == 0:
            inputs["alpha"].zero_()
        errors.append(relative(engine(inputs), eager(inputs)))
    assert median(errors) <= 1e-4
    assert max(errors) <= LIMITS[precision]
    assert counters["stats"]["unique_graphs"] == before
    assert not counters["graph_break"]


@pytest.mark.usefixtures("as_traced")
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_bank_scales_each_member_by_itself(precision: str, bases: dict[str, Path], family: Family, tmp_path: Path) -> None:
    members = two(family)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for member, file in zip(members, files, strict=True):
        save_adapter(member, file)
    build_engine(bases[precision], files, tmp_path / "e", BuildSettings("inductor"), progress=False)
    manifest, engine = open_engine(tmp_path / "e")
    eager = reference(family, bases[precision], bank_adapters(members, ["a", "b"]))
    inputs = example_inputs(eager, manifest.config, *SIZES, 3)
    expected = eager(inputs)
    assert relative(engine(inputs), expected) <= LIMITS[precision]
    swapped = inputs | {"alpha": inputs["alpha"].flip(-1)}
    assert relative(engine(swapped), expected) >= 0.1
    assert relative(engine(swapped), eager(swapped)) <= LIMITS[precision]


@pytest.mark.usefixtures("as_traced")
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_frozen_engine_has_the_bits_of_an_adapted_one_at_alpha_zero(
    precision: str, bases: dict[str, Path], family: Family, tmp_path: Path
) -> None:
    build_engine(bases[precision], None, tmp_path / "frozen", BuildSettings("inductor"), progress=False)
    build_engine(bases[precision], "shapes-gst", tmp_path / "adapted", BuildSettings("inductor"), progress=False)
    (manifest, frozen), (_, adapted) = open_engine(tmp_path / "frozen"), open_engine(tmp_path / "adapted")
    eager = reference(family, bases[precision], load_adapter("shapes-gst", family))
    inputs = example_inputs(eager, manifest.config, *SIZES, 1)
    inputs["alpha"].zero_()
    plain = {spec.name: inputs[spec.name] for spec in manifest.inputs}
    assert "alpha" not in plain
    assert relative(frozen(plain), eager(plain)) <= LIMITS[precision]
    assert torch.equal(frozen(plain), adapted(inputs))


@pytest.mark.parametrize("copy", [False, True])
def test_converted_weights_hide_those_of_the_base(copy: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    """The embedded base is float32. Its shard always stays in the folder, because of the quantised weights."""
    settings = BuildSettings("inductor", dtype="bfloat16", copy_weights=copy)
    build_engine(bases["int8"], "shapes-st", tmp_path / "e", settings, progress=False)
    engine: Any = open_engine(tmp_path / "e")[1]
    assert {parameter.dtype for parameter in engine._backbone.parameters()} == {torch.bfloat16}


@pytest.mark.usefixtures("as_traced")
@precisions
def test_bfloat16_errs_as_eager_does(precision: str, bases: dict[str, Path], family: Family, tmp_path: Path) -> None:
    settings = BuildSettings("inductor", dtype="bfloat16")
    build_engine(bases[precision], "shapes-gst", tmp_path / "e", settings, progress=False)
    manifest, engine = open_engine(tmp_path / "e")
    adapter = load_adapter("shapes-gst", family)
    wide, same = reference(family, bases[precision], adapter), reference(family, bases[precision], adapter, torch.bfloat16)
    inputs = example_inputs(wide, manifest.config, *SIZES, 2)
    exact = wide(inputs)
    assert relative(engine(inputs), exact) <= 1.2 * relative(same(inputs).float(), exact)


class Rows(nn.Module):
    """Rows that a query, a key, a value and an MLP project; the MLP has an input scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scales = nn.LayerNorm(32), RowScales()
        generator = torch.Generator().manual_seed(0)
        linears = [linear_of("fp8", torch.randn(16, 32, generator=generator), amax=amax) for amax in (4.0, 4.0, 4.0, 5.0)]
        pairs = [torch.randn(size, generator=generator) for _ in linears for size in ((4, 32), (16, 4))]
        adapted = [
            MaskedLoRAQuantizedLinear(linear, "text", self.scales, a, b)
            for linear, a, b in zip(linears, pairs[::2], pairs[1::2], strict=True)
        ]
        share_input_scales([{str(i): linear for i, linear in enumerate(adapted)}])
        self.linears = nn.ModuleList(UpdatedLinear(FP8Linear(linear), linear) for linear in adapted)

    def forward(self, x: Tensor, row_scale: Tensor) -> Tensor:
        self.scales.set(row_scale, x.shape[1])
        x = self.norm(x)
        query, key, value, hidden = (linear(x) for linear in self.linears)
        result: Tensor = query * key + value * hidden
        return result


@torch.no_grad()
@pytest.mark.parametrize("product", ["product_then_scale", "scaled_product"])
def test_projections_of_the_same_rows_round_them_once_and_updates_copy_nothing(
    product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiles C++. The second product is the GPUs', which CPUs take since torch 2.13."""
    if product == "scaled_product" and Version(torch.__version__) < Version("2.13"):
        pytest.skip("this torch has no scales per row on the CPU")
    monkeypatch.setattr(FP8Linear, "product_then_scale", getattr(FP8Linear, product))
    rows = Rows().eval().requires_grad_(False)
    x, row_scale = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)), torch.ones(2, 5)
    with torch._inductor.config.patch(inductor.compiler_passes() | {"force_disable_caches": True}):
        actual, (code,) = run_and_get_code(torch.compile(rows, fullgraph=True, dynamic=False), x, row_scale)
    torch.testing.assert_close(actual, rows(x, row_scale), rtol=1e-4, atol=1e-4)
    rounded = re.findall(r"extern_kernels\._scaled_mm\((\w+),", code)
    assert len(rounded) == 4
    assert sorted(rounded.count(name) for name in set(rounded)) == [1, 3]
    updated = re.findall(r"masked_lora_update_\.default\(reinterpret_tensor\((\w+),", code)
    assert len(set(updated)) == 4
    for name in updated:
        reused = re.search(rf"\b{name} = (\w+); del \1  # reuse", code)
        assert f"out={reused[1] if reused else name})" in code, "the update writes to the memory of the product"


def test_engine_compiles_with_the_passes(bases: dict[str, Path], family: Family, tmp_path: Path, monkeypatch: Any) -> None:
    seen = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(torch._inductor.config.post_grad_custom_pre_pass)
        return graph.forward

    monkeypatch.setattr(inductor, "COMPILER", compiler)
    torch._dynamo.reset()
    build_engine(bases["fp8"], None, tmp_path / "e", BuildSettings("inductor"), progress=False)
    manifest, engine = open_engine(tmp_path / "e")
    engine(example_inputs(reference(family, bases["fp8"], None), manifest.config, 1, 8, 8, 1))
    assert {type(one) for one in seen} == {ShareEqualNodes}


@precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_forms_compute_what_the_stored_linear_does(precision: str, dtype: torch.dtype) -> None:
    """Also for sizes that FP8 products do not take, where the weight is dequantised."""
    generator = torch.Generator().manual_seed(0)
    for n, k, form in ((48, 64, FP8Linear if precision == "fp8" else DequantisedLinear), (20, 64, DequantisedLinear)):
        linear = linear_of(precision, torch.randn(n, k, generator=generator), torch.randn(n, generator=generator))
        x = torch.randn(2, 5, k, generator=generator).to(dtype)
        x[0, 0, 0] = 1e4  # beyond the calibration
        assert FP8Linear.takes(linear) == (form is FP8Linear)
        y = form(linear)(x)
        assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, (2, 5, n), True)
        relative_bound, bound = (2e-2, 5e-2) if dtype == torch.bfloat16 else (1e-5, 1e-4)
        torch.testing.assert_close(y, linear(x), rtol=relative_bound, atol=bound)


@torch.no_grad()
def test_gpus_form_of_the_fp8_product_has_the_same_values() -> None:
    """The one with a scale per row and channel, which CPUs take since torch 2.13."""
    generator = torch.Generator().manual_seed(0)
    form = FP8Linear(linear_of("fp8", torch.randn(48, 64, generator=generator), torch.randn(48, generator=generator)))
    rounded = torch.randn(7, 64, generator=generator).mul(100).to(torch.float8_e4m3fn)
    if Version(torch.__version__) < Version("2.13"):
        pytest.skip("this torch has no scales per row on the CPU")
    actual = form.scaled_product(rounded, torch.bfloat16)
    torch.testing.assert_close(actual, form.product_then_scale(rounded, torch.bfloat16))


def test_input_scales_are_shared_where_all_blocks_of_a_class_agree(bases: dict[str, Path], family: Family) -> None:
    """A coincidence in one block would give it a form of its own, and a compilation."""
    backbone = reference(family, bases["fp8"], load_adapter("shapes-gst", family))
    blocks: Any = backbone.transformer.transformer_blocks
    assert blocks[0].attn.to_q.input_scale == blocks[0].attn.to_k.input_scale
    blocks[0].ff.net[2].input_scale = blocks[0].attn.to_q.input_scale.clone()
    assert blocks[1].ff.net[2].input_scale != blocks[1].attn.to_q.input_scale
    before = [block.ff.net[2].input_scale.item() for block in blocks]
    prepare_quantised(backbone)
    assert [block.ff.net[2].linear.input_scale.item() for block in blocks] == before
    for block in blocks:
        query, key = block.attn.to_q, block.attn.to_k
        assert isinstance(query, UpdatedLinear)
        assert query.linear.input_scale is key.linear.input_scale
        last = block.ff.net[2]
        assert last.linear.input_scale is not query.linear.input_scale
    assert not quantized_linears(backbone.transformer)
    assert not backbone.adapted


@pytest.mark.parametrize(
    ("capability", "precision", "refused"), [((8, 6), "fp8", True), ((8, 6), "int8", False), ((12, 1), "fp8", False)]
)
def test_a_gpu_without_fp8_is_refused_before_anything_is_loaded(
    capability: tuple[int, int],
    precision: str,
    refused: bool,
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_engine(bases[precision], None, tmp_path / "e", BuildSettings("inductor"), progress=False)
    manifest = read_manifest(tmp_path / "e")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if refused:
        with pytest.raises(SliderEditError, match=r"is sm86, which does not compute in fp8; .*quantised to int8"):
            Inductor().choose_device(manifest, RunSettings(device="cuda"))
    else:
        assert Inductor().choose_device(manifest, RunSettings(device="cuda")).type == "cuda"


@torch.no_grad()
def test_a_quantised_projection_takes_the_a_and_b_of_each_call() -> None:
    generator = torch.Generator().manual_seed(0)
    scales, x = RowScales(), torch.randn(2, 5, 32, generator=generator)
    scales.set(torch.ones(2, 5), 5)
    linear, zeros = linear_of("int8", torch.randn(16, 32, generator=generator)), (torch.zeros(4, 32), torch.zeros(16, 4))
    per_call, pair = MaskedLoRAQuantizedLinear(linear, "text", scales, *zeros), CallPair()
    per_call.take_from_calls(pair)
    updated = UpdatedLinear(DequantisedLinear(linear), per_call)
    results = []
    for _ in range(2):
        pair.a, pair.b = torch.randn(4, 32, generator=generator), torch.randn(16, 4, generator=generator)
        constant = MaskedLoRAQuantizedLinear(linear, "text", scales, pair.a, pair.b)
        expected = UpdatedLinear(DequantisedLinear(linear), constant)(x)
        results.append(updated(x))
        assert torch.equal(results[-1], expected)
        torch.testing.assert_close(per_call(x), constant(x))
    assert not torch.equal(*results)


def test_folding_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SliderEditError, match="cannot be combined with a quantised base"):
        build_engine(bases["int8"], "shapes-gst", tmp_path / "e", BuildSettings("inductor", "folded"), progress=False)
