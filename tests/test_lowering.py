"""What becomes of the slider nodes of a traced graph: the same numbers in every lowering, and the form that each promises."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript
import pytest
import torch
from diffusers import FluxTransformer2DModel
from onnxscript import opset20 as op

from slideredit_rt.adapters import Adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.engines import get_backend
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export import lowering, tensorrt_plugin
from slideredit_rt.export.lowering import choose, lower
from slideredit_rt.export.nodes import DOMAIN, LINEAR
from slideredit_rt.export.onnx_graph import example_inputs, trace
from slideredit_rt.families import KINDS, Family, Kind
from slideredit_rt.modules import SliderBackbone

RANKS = (3, 16, 5)  # in turns: odd ones, and groups whose members differ


def backbone_of(family: Family, kind: Kind, dtype: torch.dtype, ranks: tuple[int, ...] = RANKS) -> SliderBackbone:
    """One block of each sort, one adapted linear without a bias, and an adapter of several ranks."""
    torch.manual_seed(0)
    config = FluxTransformer2DModel.load_config(resolve_base("shapes-kontext") / "transformer")
    transformer = FluxTransformer2DModel.from_config(config, num_layers=1, num_single_layers=1)
    transformer.transformer_blocks[0].attn.to_add_out.register_parameter("bias", None)
    names = [n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear) and family.targets(kind).fullmatch(n)]
    pairs = {}
    for index, name in enumerate(names):
        linear, rank = transformer.get_submodule(name), ranks[index % len(ranks)]
        pairs[name] = (torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank) / 8)
    adapter = Adapter(family.name, kind, max(ranks), {n: (a.to(dtype), b.to(dtype)) for n, (a, b) in pairs.items()}, "random")
    return SliderBackbone(family, transformer.to(dtype).eval(), adapter)


@dataclasses.dataclass
class Traced:
    kind: Kind
    backbone: SliderBackbone
    config: dict[str, Any]
    proto: onnx.ModelProto
    modules: list[str]

    def model(self) -> ir.Model:
        """A copy that a test may lower."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        return ir.serde.deserialize_model(copy)


def traced_of(family: Family, kind: Kind, dtype: torch.dtype, ranks: tuple[int, ...] = RANKS) -> Traced:
    backbone = backbone_of(family, kind, dtype, ranks)
    config: dict[str, Any] = dict(backbone.transformer.config)  # type: ignore[arg-type]
    proto = ir.serde.serialize_model(trace(backbone, config).model)
    return Traced(kind, backbone, config, proto, list(backbone.adapted))


@pytest.fixture(scope="module", params=KINDS)
def traced(request: pytest.FixtureRequest, family: Family) -> Traced:
    return traced_of(family, request.param, torch.float32)


@pytest.fixture(scope="module")
def half(family: Family) -> Traced:
    return traced_of(family, "gst", torch.bfloat16, ranks=(16,))


def difference(traced: Traced, model: ir.Model) -> float:
    """Largest difference between ONNX Runtime and eager torch over three sets of sizes, beside what the sliders change."""
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    found = []
    for sizes in ((2, 24, 32, 2), (1, 7, 20, 1), (3, 11, 12, 5)):
        inputs = example_inputs(traced.backbone, traced.config, *sizes)
        with torch.no_grad():
            expected = traced.backbone(inputs)
            frozen = traced.backbone(inputs | {"alpha": torch.zeros_like(inputs["alpha"])})
        effect = float((expected - frozen).abs().max())
        names = {i.name for i in session.get_inputs()}
        actual = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in names})[0]
        found.append(float(np.abs(actual - expected.numpy()).max()) / effect)
    return max(found)


def operators(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("form", ["native", "folded"])
def test_every_lowering_computes_what_eager_torch_does(traced: Traced, form: Any) -> None:
    model = traced.model()
    assert lower(model, form) == ({form: len(traced.modules)}, [])
    assert difference(traced, model) <= 1e-3


def test_native_gives_every_projection_a_node_with_a_body(traced: Traced) -> None:
    model = traced.model()
    lower(model, "native")
    assert operators(model)["MaskedLoRA"] == len(traced.modules)
    assert [(f.domain, f.name) for f in model.functions.values()] == [("slideredit", "MaskedLoRA")]
    assert LINEAR not in operators(model)


def test_folded_leaves_one_matrix_product_per_projection_and_one_for_all_of_the_same_rows(traced: Traced) -> None:
    model = traced.model()
    before = operators(model)
    lower(model, "folded")
    after = operators(model)
    assert not model.functions
    # q, k and v read the same rows; the others read rows of their own.
    qkv = sum(name.endswith(("add_q_proj", "to_q")) for name in traced.modules)
    groups = len(traced.modules) - 2 * qkv
    assert after["MatMul"] - before["MatMul"] == len(traced.modules) + groups
    assert after["Concat"] - before["Concat"] >= len(traced.modules) + groups


def test_folded_columns_are_filled_up_to_sixteen_bytes_of_half_precision(traced: Traced) -> None:
    model = traced.model()
    lower(model, "folded")
    inferred = onnx.shape_inference.infer_shapes(ir.serde.serialize_model(model), strict_mode=True)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info}
    widths = [shape[1] for name, shape in shapes.items() if name.endswith("/weight_and_lora_b:0")]
    assert len(widths) == len(traced.modules)
    assert not any(width % 8 for width in widths)


def test_plugin_nodes_carry_what_tensorrts_parser_asks_for(half: Traced) -> None:
    model = half.model()
    counts, notes = lower(model, "plugin", "sm90")
    assert (counts, notes) == ({"plugin": len(half.modules)}, [])
    nodes = [node for node in model.graph if node.op_type == LINEAR]
    assert sorted(str(node.name) for node in nodes) == sorted(half.modules)
    for node in nodes:
        assert node.domain == DOMAIN
        assert {name: attribute.value for name, attribute in node.attributes.items()} == tensorrt_plugin.NODE_ATTRIBUTES
        inputs: list[Any] = [*node.inputs]
        x, weight, bias, lora_a, lora_b, row_scale = inputs
        assert all(v is not None for v in inputs), "the kernel reads a bias from every projection"
        n, k = weight.shape
        assert (list(bias.shape), list(lora_a.shape), list(lora_b.shape)) == ([n], [16, k], [n, 16])
        assert (x.dtype, row_scale.dtype) == (ir.DataType.BFLOAT16, ir.DataType.FLOAT)
        assert tensorrt_plugin.why_not(k, n, 16, "bfloat16", "sm90") is None
    assert not model.functions, "the plugin must not meet a local function of its name"


@onnxscript.script(onnxscript.values.Opset(DOMAIN, 1), default_opset=op)
def MaskedLoRALinear(x, weight, bias, lora_a, lora_b, row_scale):  # type: ignore  # noqa: N802
    low = op.MatMul(x, op.Transpose(lora_a, perm=[1, 0])) * op.Unsqueeze(row_scale, op.Constant(value_ints=[-1]))
    base = op.MatMul(x, op.Transpose(weight, perm=[1, 0])) + bias
    return base + op.MatMul(low, op.Transpose(lora_b, perm=[1, 0]))


def test_plugin_graph_computes_what_eager_torch_does_once_the_plugin_does(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formula as a local function stands for the kernel, which computes in half precision only."""
    monkeypatch.setattr(lowering, "_why_no_plugin", lambda *_: None)
    model = traced.model()
    lower(model, "plugin", "sm90")
    for node in model.graph:
        if node.op_type == LINEAR:
            node.attributes.clear()
    body = ir.serde.deserialize_function(MaskedLoRALinear.to_function_proto())
    model.functions[body.identifier()] = body
    assert difference(traced, model) <= 1e-3


def test_projections_without_a_kernel_become_native_with_the_reason(traced: Traced) -> None:
    model = traced.model()
    counts, notes = lower(model, "plugin", "sm90")
    assert counts == {"native": len(traced.modules)}
    assert len(notes) == len(traced.modules)
    assert f"{traced.modules[0]} has no plugin: the plugin computes in bfloat16 or float16, not in float32" in notes
    assert difference(traced, model) <= 1e-3


def test_nodes_are_named_after_their_projections(traced: Traced) -> None:
    for form, last in (("native", "masked_lora"), ("folded", "base_and_update")):
        model = traced.model()
        lower(model, form)  # type: ignore[arg-type]
        names = {str(node.name) for node in model.graph}
        assert {f"{module}/{last}" for module in traced.modules} <= names


@pytest.mark.parametrize(
    ("asked", "kind", "backend", "chosen"),
    [
        ("auto", "st", "onnxruntime", "native"),
        ("auto", "gst", "onnxruntime", "folded"),
        ("auto", "st", "tensorrt", "native"),
        ("auto", "gst", "tensorrt-rtx", "folded"),
        ("auto", None, "tensorrt", "native"),
        ("plugin", "st", "tensorrt", "plugin"),
        ("native", "gst", "tensorrt", "native"),
        ("auto", "st", "inductor", "operator"),
        ("auto", "gst", "inductor", "folded"),
        ("operator", None, "inductor", "operator"),
    ],
)
def test_what_auto_means(asked: str, kind: Kind | None, backend: str, chosen: str) -> None:
    assert choose(asked, kind, get_backend(backend)) == chosen


def test_a_lowering_that_does_not_exist() -> None:
    with pytest.raises(SliderEditError, match="unknown lowering 'fast'; choose auto, native, folded, plugin, operator"):
        choose("fast", "st", get_backend("onnxruntime"))


@pytest.mark.parametrize(
    ("asked", "backend", "instead"),
    [
        ("plugin", "onnxruntime", "native or folded, or --backend tensorrt"),
        ("plugin", "tensorrt-rtx", "native or folded, or --backend tensorrt"),
        ("operator", "tensorrt", "native or folded or plugin, or --backend inductor"),
        ("native", "inductor", "operator or folded, or --backend onnxruntime or tensorrt or tensorrt-rtx"),
    ],
)
def test_a_lowering_that_the_backend_lacks(asked: str, backend: str, instead: str) -> None:
    with pytest.raises(SliderEditError) as error:
        choose(asked, "st", get_backend(backend))
    assert str(error.value) == f"the backend {backend} does not support the lowering {asked!r}; use --lowering {instead}"
