"""Quantised bases on Inductor: eager's numbers, one rounding for projections of the same rows, no compilation per setting.

What dynamo captures is run as it is, except where a test says that it compiles C++.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from test_quantization import linear_of
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from slideredit_rt.adapters import Adapter, bank_adapters, load_adapter, save_adapter
from slideredit_rt.engines import BuildSettings, inductor, open_engine
from slideredit_rt.engines.inductor import Inductor
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.engines.quantised import DequantisedLinear, FP8Linear, UpdatedLinear, prepare_quantised
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.quantization.linear import quantized_linears
from slideredit_rt.quantization.loading import load_transformer
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base
from slideredit_rt.settings import RunSettings

PRECISIONS = ("fp8", "int8", "int4")
SIZES = (2, 8, 16)
precisions = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantised")
    for precision in PRECISIONS:
        quantize_base("shapes-kontext", root / precision, QuantizeSettings(precision), progress=False)
    return {precision: root / precision for precision in PRECISIONS}


@pytest.fixture
def as_traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo runs the graphs that it captured; one thread is enough for them."""
    monkeypatch.setattr(inductor, "COMPILER", "eager")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


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
    for seed in range(12):
        inputs = example_inputs(eager, manifest.config, *SIZES, 1 + seed % 4, seed=seed)
        if seed % 5 == 0:
            inputs["alpha"].zero_()
        actual = engine(inputs)
        # A different order of sums moves a few activations to the next FP8 value; the quantisation itself errs by 3e-2.
        assert relative(actual, eager(inputs)) <= (1e-3 if precision == "fp8" else 1e-5)
    assert counters["stats"]["unique_graphs"] == before
    assert not counters["graph_break"]


@pytest.mark.usefixtures("as_traced")
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_bank_scales_each_member_by_itself(precision: str, bases: dict[str, Path], family: Family, tmp_path: Path) -> None:
    members = two(family)
    files = [
        save_adapter(one, tmp_path / f"{name}.safetensors") or tmp_path / f"{name}.safetensors"
        for one, name in zip(members, ("a", "b"), strict=True)
    ]
    build_engine(bases[precision], files, tmp_path / "e", BuildSettings("inductor"), progress=False)
    manifest, engine = open_engine(tmp_path / "e")
    eager = reference(family, bases[precision], bank_adapters(members, ["a", "b"]))
    inputs = example_inputs(eager, manifest.config, *SIZES, 3)
    expected = eager(inputs)
    assert relative(engine(inputs), expected) <= 1e-3
    swapped = inputs | {"alpha": inputs["alpha"].flip(-1)}
    assert relative(engine(swapped), expected) >= 1e-2
    assert relative(engine(swapped), eager(swapped)) <= 1e-3


@pytest.mark.usefixtures("as_traced")
@precisions
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
    assert relative(frozen(plain), eager(plain)) <= (1e-3 if precision == "fp8" else 1e-5)
    assert torch.equal(frozen(plain), adapted(inputs))


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


def test_projections_of_the_same_rows_round_them_once_and_updates_copy_nothing(
    bases: dict[str, Path], family: Family, tmp_path: Path
) -> None:
    """Compiles C++. Reads the code of a double block and of a single block, the latter in two variants of strides."""
    build_engine(bases["fp8"], "shapes-st", tmp_path / "e", BuildSettings("inductor"), progress=False)
    manifest, engine = open_engine(tmp_path / "e")
    eager = reference(family, bases["fp8"], load_adapter("shapes-st", family))
    inputs = example_inputs(eager, manifest.config, *SIZES, 2)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        actual, codes = run_and_get_code(lambda: engine(inputs).clone())
    assert relative(actual, eager(inputs)) <= 1e-3
    rounded = [re.findall(r"extern_kernels\._scaled_mm\((\w+),", code) for code in codes]
    # Query, key and value share their input, of the image and of the text, and a single block's MLP shares it with them.
    assert [(len(one), len(set(one))) for one in rounded] == [(12, 8), (5, 2), (5, 2)]
    updated = re.findall(r"masked_lora_update_\.default\((?:reinterpret_tensor\()?(\w+)", codes[0])
    assert len(updated) == 6
    for name in updated:
        # The product's own memory, scaled in place.
        assert re.search(rf"{name} = reinterpret_tensor\(\w+|{name} = \w+; del \w+  # reuse", codes[0])


@precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_forms_compute_what_the_stored_linear_does(precision: str, dtype: torch.dtype) -> None:
    """Also for sizes that FP8 products do not take, where the weight is dequantised."""
    generator = torch.Generator().manual_seed(0)
    for n, k, form in ((48, 64, FP8Linear if precision == "fp8" else DequantisedLinear), (20, 64, DequantisedLinear)):
        linear = linear_of(precision, torch.randn(n, k, generator=generator), torch.randn(n, generator=generator))
        x = torch.randn(2, 5, k, generator=generator).to(dtype)
        assert FP8Linear.takes(linear) == (form is FP8Linear)
        y = form(linear)(x)
        assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, (2, 5, n), True)
        torch.testing.assert_close(
            y, linear(x), **({"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4})
        )


@torch.no_grad()
def test_gpus_form_of_the_fp8_product_has_the_same_values() -> None:
    """The one with a scale per row and channel, which CPUs take since torch 2.13."""
    generator = torch.Generator().manual_seed(0)
    form = FP8Linear(linear_of("fp8", torch.randn(48, 64, generator=generator), torch.randn(48, generator=generator)))
    rounded = torch.randn(7, 64, generator=generator).mul(100).to(torch.float8_e4m3fn)
    try:
        actual = form.scaled_product(rounded, torch.bfloat16)
    except RuntimeError:
        pytest.skip("this torch has no scales per row on the CPU")
    torch.testing.assert_close(actual, form.product_then_scale(rounded, torch.bfloat16))


@torch.no_grad()
def test_values_beyond_the_calibration_are_clamped() -> None:
    linear = linear_of("fp8", torch.eye(16), amax=2.0)
    y = FP8Linear(linear)(torch.tensor([[1e6] + [0.0] * 15]))
    assert y[0, 0] == linear.input_scale * 448
    assert torch.isfinite(y).all()


def test_input_scales_are_shared_where_all_blocks_of_a_class_agree(bases: dict[str, Path], family: Family) -> None:
    """A coincidence in one block would give it a form of its own, and a compilation."""
    backbone = reference(family, bases["fp8"], load_adapter("shapes-gst", family))
    blocks = backbone.transformer.transformer_blocks
    assert blocks[0].attn.to_q.input_scale == blocks[0].attn.to_k.input_scale
    blocks[1].ff.net[2].input_scale = blocks[1].attn.to_q.input_scale.clone()
    assert blocks[0].ff.net[2].input_scale != blocks[0].attn.to_q.input_scale
    prepare_quantised(backbone)
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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if refused:
        with pytest.raises(SliderEditError, match=r"is sm86, which does not compute in fp8, only sm89, .*quantised to int8"):
            Inductor().choose_device(manifest, RunSettings(device="cuda"))
    else:
        assert Inductor().choose_device(manifest, RunSettings(device="cuda")).type == "cuda"


def test_folding_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SliderEditError, match="would rebuild the quantised weights"):
        build_engine(bases["int8"], "shapes-gst", tmp_path / "e", BuildSettings("inductor", "folded"), progress=False)
