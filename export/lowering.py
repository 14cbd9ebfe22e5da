"""Lowerings of the masked update: replacements of the `slideredit::MaskedLoRALinear` nodes of a traced graph.

Each node is a complete adapted projection, `y = x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ`. Its inputs in order: x `[B, S, K]`,
weight `[N, K]`, bias `[N]` or none, lora_a `[R, K]`, lora_b `[N, R]`, row_scale float32 `[B, S]`. For a bank of G adapters,
row_scale is `[B, S, G]`, and member g owns the columns g·R/G to (g + 1)·R/G of the low-rank product.

- `native`: MatMul, Add and one `slideredit::MaskedLoRA` local function of standard operators, for every runtime.
- `folded`: one MatMul with extra inner columns, `[x | s·xAᵀ] · [W | B]ᵀ`. Projections of the same rows share the first
  factor. Meant for GST.
- `plugin`: the node is kept, and TensorRT runs this package's Triton kernel. Projections without a kernel become `native`.
- `operator`: no graph at all; Inductor runs this package's torch operator.

Inductor has no graph for `folded` either; it folds modules when it opens an engine (`slideredit_rt.engines.folding`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import onnxscript
from onnxscript import opset20 as op

from slideredit_rt.engines import BACKENDS, Backend
from slideredit_rt.engines.backend import LOWERINGS, Lowering
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export import tensorrt_plugin
from slideredit_rt.families import Kind

DOMAIN = tensorrt_plugin.NAMESPACE
LINEAR = tensorrt_plugin.NAME
# The folded form pads its extra columns to a multiple of this many elements: 16 bytes in half precision, the row alignment
# that GEMM kernels need.
_COLUMNS = 8
_T = onnxscript.onnx_types.TensorType
_slideredit = onnxscript.values.Opset(DOMAIN, 1)


@onnxscript.script(_slideredit, default_opset=op)
def MaskedLoRA(y: _T, x: _T, lora_a: _T, lora_b: _T, scale: _T) -> _T:  # type: ignore  # noqa: N802
    """`y + (scale · x Aᵀ) Bᵀ`; y `[B, S, N]`, x `[B, S, K]`, A `[R, K]`, B `[N, R]`, scale float32 `[B, S, 1 or R]`."""
    low = op.MatMul(x, op.Transpose(lora_a, perm=[1, 0]))
    # Scale the R-wide product instead of the N-wide one, which takes R/N of the multiplications.
    scaled = op.CastLike(op.Mul(op.CastLike(low, scale), scale), lora_b)
    update = op.MatMul(scaled, op.Transpose(lora_b, perm=[1, 0]))
    return op.Add(y, op.CastLike(update, y))  # type: ignore[no-any-return]


def choose(asked: str, kind: Kind | None, backend: Backend, *, bank: bool = False) -> Lowering:
    """Return the lowering that an engine is built with.

    Args:
        asked: `auto` or one of `LOWERINGS`.
        kind: Kind of the adapter; None for a frozen backbone.
        backend: Backend that will execute the engine.
        bank: True for a bank of adapters.

    Raises:
        SliderEditError: There is no such lowering, the backend does not support it, or it is a plugin for a bank.
    """
    if asked == "auto":
        return backend.default_lowering(kind)
    if asked not in LOWERINGS:
        raise SliderEditError(f"unknown lowering {asked!r}; choose auto, {', '.join(LOWERINGS)}")
    if asked not in backend.lowerings:
        others = [name for name, other in BACKENDS.items() if asked in other.lowerings]
        raise SliderEditError(
            f"the backend {backend.name} does not support the lowering {asked!r}; use --lowering "
            f"{' or '.join(backend.lowerings)}, or --backend {' or '.join(others)}"
        )
    if asked == "plugin" and bank:
        raise SliderEditError(
            "the plugin's kernel takes one scale per row, but a bank of adapters has one per row and member; "
            "use --lowering native or folded"
        )
    return asked


def lower(model: ir.Model, lowering: Lowering, target: str | None = None) -> tuple[dict[str, int], list[str]]:
    """Replace the slider nodes of a traced graph, in place.

    Args:
        model: Result of `onnx_graph.trace`.
        lowering: Lowering for all nodes.
        target: Compute capability that plugins are compiled for, such as `sm90`.

    Returns:
        Number of nodes by their final lowering, and one sentence for each node that could not be a plugin.

    Raises:
        ValueError: The lowering is `operator`, or `plugin` without a target.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == LINEAR]
    reasons = {}
    if lowering == "operator":
        raise ValueError("the lowering 'operator' does not apply to a graph")
    if lowering == "plugin":
        if target is None:
            raise ValueError("the lowering 'plugin' needs a target")
        reasons = {n: f"{_module(n)} has no plugin: {why}" for n in nodes if (why := _why_no_plugin(n, target))}
    native = list(reasons) if lowering == "plugin" else nodes if lowering == "native" else []
    for node in native:
        _to_native(model.graph, node)
    if native:
        body = ir.serde.deserialize_function(MaskedLoRA.to_function_proto())
        model.functions[body.identifier()] = body
    if lowering == "folded":
        _fold(model.graph, nodes)
    if lowering == "plugin":
        for node in nodes:
            if node not in reasons:
                _to_plugin(model.graph, node)
    if nodes:
        model.opset_imports[DOMAIN] = 1
    counts = {lowering: len(nodes)} if lowering == "native" else {lowering: len(nodes) - len(native), "native": len(native)}
    found = {name: count for name, count in counts.items() if count}
    return found, list(reasons.values())


def _module(node: ir.Node) -> str:
    """Return a projection's name in the transformer, from the name of its weight."""
    weight = node.inputs[1]
    return str(weight.name if weight else node.name).removeprefix("transformer.").removesuffix(".weight")


def _values(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value | None, ir.Value, ir.Value, ir.Value]:
    x, weight, bias, lora_a, lora_b, row_scale = node.inputs
    assert x is not None
    assert weight is not None
    assert lora_a is not None
    assert lora_b is not None
    assert row_scale is not None
    return x, weight, bias, lora_a, lora_b, row_scale


class _Builder:
    """Collector for the nodes of one replacement, which are named after their projection."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.nodes: list[ir.Node] = []

    def __call__(
        self, op_type: str, inputs: Iterable[ir.Value], name: str, attributes: dict[str, int | list[int]] | None = None
    ) -> ir.Value:
        domain = DOMAIN if op_type == "MaskedLoRA" else ""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, name=f"{self.scope}/{name}")
        node.outputs[0].name = f"{self.scope}/{name}:0"
        self.nodes.append(node)
        return node.outputs[0]

    def transposed(self, matrix: ir.Value, name: str) -> ir.Value:
        return self("Transpose", [matrix], name, {"perm": [1, 0]})


def _replace(graph: ir.Graph, node: ir.Node, built: _Builder, result: ir.Value) -> None:
    old = node.outputs[0]
    result.type, result.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], built.nodes, [old], [result])


def _constant(graph: ir.Graph, shape: tuple[int, ...], like: ir.Value) -> ir.Value:
    """Return an initializer of zeros with the dtype of `like`. Equal initializers are shared."""
    assert like.dtype is not None
    name = f"zeros_{like.dtype.name.lower()}_{'x'.join(map(str, shape))}"
    if name not in graph.initializers:
        _add_initializer(graph, ir.tensor(np.zeros(shape, like.dtype.numpy()), like.dtype, name=name))
    return graph.initializers[name]


def _integers(graph: ir.Graph, values: list[int], name: str) -> ir.Value:
    """Return an int64 initializer. Initializers of the same name must have the same content."""
    if name not in graph.initializers:
        _add_initializer(graph, ir.tensor(np.array(values), name=name))
    return graph.initializers[name]


def _column_scale(graph: ir.Graph, build: _Builder, row_scale: ir.Value, ranks: list[int], filling: int = 0) -> ir.Value:
    """Return the scales of concatenated low-rank products: `[B, S, 1]`, or for a bank one column per column of the products.

    Args:
        graph: Graph for new initializers.
        build: Collector for new nodes.
        row_scale: float32 `[B, S]`, for a bank `[B, S, G]`.
        ranks: Ranks of the products.
        filling: Number of padding columns, whose scale does not matter.
    """
    assert row_scale.shape is not None
    if len(row_scale.shape) == 2:
        return build("Unsqueeze", [row_scale, _integers(graph, [-1], "last_axis")], "row_scale")
    count = _size(row_scale, 2)
    owners = [column // (rank // count) for rank in ranks for column in range(rank)] + [0] * filling
    name = f"members_{count}_{'_'.join(map(str, ranks))}_{filling}"
    return build("Gather", [row_scale, _integers(graph, owners, name)], "row_scale", {"axis": 2})


def _add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> None:
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    graph.register_initializer(ir.Value(name=tensor.name, type=kind, shape=shape, const_value=tensor))


def _size(value: ir.Value, axis: int) -> int:
    assert value.shape is not None
    return int(value.shape[axis])  # type: ignore[arg-type]


def _to_native(graph: ir.Graph, node: ir.Node) -> None:
    x, weight, bias, lora_a, lora_b, row_scale = _values(node)
    build = _Builder(_module(node))
    y = build("MatMul", [x, build.transposed(weight, "weight_transposed")], "base")
    if bias is not None:
        y = build("Add", [y, bias], "bias")
    scale = _column_scale(graph, build, row_scale, [_size(lora_a, 0)])
    _replace(graph, node, build, build("MaskedLoRA", [y, x, lora_a, lora_b, scale], "masked_lora"))


def _fold(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Replace nodes by the folded form. `[x | s·xAᵀ]` is computed once for all projections of the same rows.

    Their A's are stacked, and each projection has zeros in the columns of the other ones.
    """
    groups: dict[tuple[ir.Value, ir.Value], list[ir.Node]] = {}
    for node in nodes:
        x, *_, row_scale = _values(node)
        groups.setdefault((x, row_scale), []).append(node)
    for (x, row_scale), group in groups.items():
        assert x.dtype is not None
        build = _Builder(_module(group[0]))
        all_a = [_values(node)[3] for node in group]
        ranks = [_size(a, 0) for a in all_a]
        if filling := -sum(ranks) % _COLUMNS:
            all_a.append(_constant(graph, (filling, _size(all_a[0], 1)), like=all_a[0]))
        merged = build("Concat", all_a, "lora_a", {"axis": 0}) if len(all_a) > 1 else all_a[0]
        low = build("MatMul", [x, build.transposed(merged, "lora_a_transposed")], "low_rank")
        scale = _column_scale(graph, build, row_scale, ranks, filling)
        wide = build("Cast", [low], "low_rank_float32", {"to": ir.DataType.FLOAT})
        scaled = build("Cast", [build("Mul", [wide, scale], "scaled_float32")], "scaled", {"to": x.dtype})
        bracket = build("Concat", [x, scaled], "x_and_low_rank", {"axis": -1})
        graph.insert_before(group[0], build.nodes)
        for index, node in enumerate(group):
            _, weight, bias, _, lora_b, _ = _values(node)
            build, n = _Builder(_module(node)), _size(weight, 0)
            left, right = sum(ranks[:index]), sum(ranks[index + 1 :]) + filling
            before, after = ([_constant(graph, (n, width), like=weight)] if width else [] for width in (left, right))
            both = build("Concat", [weight, *before, lora_b, *after], "weight_and_lora_b", {"axis": 1})
            y = build("MatMul", [bracket, build.transposed(both, "weight_and_lora_b_transposed")], "base_and_update")
            _replace(graph, node, build, build("Add", [y, bias], "bias") if bias is not None else y)


def _why_no_plugin(node: ir.Node, target: str) -> str | None:
    _, weight, _, lora_a, _, _ = _values(node)
    assert weight.dtype is not None
    dtype = np.dtype(weight.dtype.numpy()).name
    return tensorrt_plugin.why_not(_size(weight, 1), _size(weight, 0), _size(lora_a, 0), dtype, target)


def _to_plugin(graph: ir.Graph, node: ir.Node) -> None:
    x, weight, bias, lora_a, lora_b, row_scale = _values(node)
    bias = bias or _constant(graph, (_size(weight, 0),), like=weight)
    plugin = ir.node(
        LINEAR,
        [x, weight, bias, lora_a, lora_b, row_scale],
        tensorrt_plugin.NODE_ATTRIBUTES,
        domain=DOMAIN,
        name=_module(node),
    )
    result = plugin.outputs[0]
    result.name = f"{plugin.name}:0"
    built = _Builder(_module(node))
    built.nodes.append(plugin)
    _replace(graph, node, built, result)
