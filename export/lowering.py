"""Lowerings of the masked update: replacements of the `slideredit::MaskedLoRALinear` nodes of a traced graph.

Each node is a complete adapted projection, `y = x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ`. Its inputs in order: x `[B, S, K]`,
weight `[N, K]`, bias `[N]` or none, lora_a `[R, K]`, lora_b `[N, R]`, row_scale float32 `[B, S]`. For a bank of G adapters,
row_scale is `[B, S, G]`, and member g owns the columns g·R/G to (g + 1)·R/G of the low-rank product.

- `native`: MatMul, Add and one `slideredit::MaskedLoRA` local function of standard operators, for every runtime.
- `folded`: one MatMul with extra inner columns, `[x | s·xAᵀ] · [W | B]ᵀ`. Projections of the same rows share the first
  factor. Meant for GST.
- `plugin`: the node is kept, and TensorRT runs this package's Triton kernel. Projections without a kernel become `native`.
- `operator`: no graph at all; Inductor runs this package's torch operator.

A `slideredit::MaskedLoRAUpdate` node is the update beside a quantised projection, with y in place of weight and bias. It only
has the native form: folding would put the quantised weight together with B, which rebuilds it in full in every step.

Inductor has no graph for `folded` either; it folds modules when it opens an engine (`slideredit_rt.engines.folding`).
"""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import onnxscript
from onnxscript import opset20 as op

from slideredit_rt.engines import BACKENDS, Backend
from slideredit_rt.engines.backend import LOWERINGS, Lowering
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export import tensorrt_plugin
from slideredit_rt.export.nodes import (
    DOMAIN,
    LINEAR,
    UPDATE,
    Builder,
    integers,
    present,
    projection_name,
    replace_node,
    size_of,
    zeros,
)
from slideredit_rt.families import Kind

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


def choose(asked: str, kind: Kind | None, backend: Backend, *, bank: bool = False, separate: str | None = None) -> Lowering:
    """Return the lowering that an engine is built with.

    Args:
        asked: `auto` or one of `LOWERINGS`.
        kind: Kind of the adapter; None for a frozen backbone.
        backend: Backend that will execute the engine.
        bank: True for a bank of adapters.
        separate: Reason why updates stay separate from the weights, as in the backend's first lowering: "a quantised base" or
            "adapter inputs"; None if they need not.

    Raises:
        SliderEditError: There is no such lowering, the backend does not support it, it is a plugin for a bank, or it would put
            weights and updates together in every step.
    """
    if asked == "auto":
        return backend.default_lowering(kind, separate=separate is not None)
    if asked not in LOWERINGS:
        raise SliderEditError(f"unknown lowering {asked!r}; choose auto, {', '.join(LOWERINGS)}")
    if asked not in backend.lowerings:
        others = [name for name, other in BACKENDS.items() if asked in other.lowerings]
        raise SliderEditError(
            f"the backend {backend.name} does not support the lowering {asked!r}; use --lowering "
            f"{' or '.join(backend.lowerings)}, or --backend {' or '.join(others)}"
        )
    if separate is not None and asked != backend.lowerings[0]:
        raise SliderEditError(
            f"the lowering {asked!r} cannot be combined with {separate}, because it puts weights and updates together, which "
            f"would happen in every step; use --lowering {backend.lowerings[0]}"
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
    beside = [node for node in model.graph if node.domain == DOMAIN and node.op_type == UPDATE]
    reasons = {}
    if lowering == "operator":
        raise ValueError("the lowering 'operator' does not apply to a graph")
    if lowering == "plugin":
        if target is None:
            raise ValueError("the lowering 'plugin' needs a target")
        reasons = {n: f"{projection_name(n)} has no plugin: {why}" for n in nodes if (why := _why_no_plugin(n, target))}
    native = list(reasons) if lowering == "plugin" else nodes if lowering == "native" else []
    for node in native:
        _to_native(model.graph, node)
    for node in beside:
        _update_to_native(model.graph, node)
    if native or beside:
        body = ir.serde.deserialize_function(MaskedLoRA.to_function_proto())
        model.functions[body.identifier()] = body
    if lowering == "folded":
        _fold(model.graph, nodes)
    if lowering == "plugin":
        for node in nodes:
            if node not in reasons:
                _to_plugin(model.graph, node)
    if nodes or beside:
        model.opset_imports[DOMAIN] = 1
    counts: collections.Counter[str] = collections.Counter({lowering: len(nodes) - len(native)})
    counts["native"] += len(native) + len(beside)
    found = {name: count for name, count in counts.items() if count}
    return found, list(reasons.values())


def _values(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value | None, ir.Value, ir.Value, ir.Value]:
    x, weight, bias, lora_a, lora_b, row_scale = node.inputs
    x, weight, lora_a, lora_b, row_scale = present([x, weight, lora_a, lora_b, row_scale])
    return x, weight, bias, lora_a, lora_b, row_scale


def _column_scale(graph: ir.Graph, build: Builder, row_scale: ir.Value, ranks: list[int], filling: int = 0) -> ir.Value:
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
        return build("Unsqueeze", [row_scale, integers(graph, [-1], "last_axis")], "row_scale")
    count = size_of(row_scale, 2)
    owners = [column // (rank // count) for rank in ranks for column in range(rank)] + [0] * filling
    name = f"members_{count}_{'_'.join(map(str, ranks))}_{filling}"
    return build("Gather", [row_scale, integers(graph, owners, name)], "row_scale", {"axis": 2})


def _to_native(graph: ir.Graph, node: ir.Node) -> None:
    x, weight, bias, lora_a, lora_b, row_scale = _values(node)
    build = Builder(projection_name(node))
    y = build("MatMul", [x, build.transposed(weight, "weight_transposed")], "base")
    if bias is not None:
        y = build("Add", [y, bias], "bias")
    scale = _column_scale(graph, build, row_scale, [size_of(lora_a, 0)])
    replace_node(graph, node, build, build("MaskedLoRA", [y, x, lora_a, lora_b, scale], "masked_lora", domain=DOMAIN))


def _update_to_native(graph: ir.Graph, node: ir.Node) -> None:
    y, x, lora_a, lora_b, row_scale = present(node.inputs)
    build = Builder(str(lora_a.name).removeprefix("transformer.").removesuffix(".lora_A"))
    scale = _column_scale(graph, build, row_scale, [size_of(lora_a, 0)])
    replace_node(graph, node, build, build("MaskedLoRA", [y, x, lora_a, lora_b, scale], "masked_lora", domain=DOMAIN))


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
        build = Builder(projection_name(group[0]))
        all_a = [_values(node)[3] for node in group]
        ranks = [size_of(a, 0) for a in all_a]
        if filling := -sum(ranks) % _COLUMNS:
            all_a.append(zeros(graph, (filling, size_of(all_a[0], 1)), like=all_a[0]))
        merged = build("Concat", all_a, "lora_a", {"axis": 0}) if len(all_a) > 1 else all_a[0]
        low = build("MatMul", [x, build.transposed(merged, "lora_a_transposed")], "low_rank")
        scale = _column_scale(graph, build, row_scale, ranks, filling)
        wide = build("Cast", [low], "low_rank_float32", {"to": ir.DataType.FLOAT})
        scaled = build("Cast", [build("Mul", [wide, scale], "scaled_float32")], "scaled", {"to": x.dtype})
        bracket = build("Concat", [x, scaled], "x_and_low_rank", {"axis": -1})
        graph.insert_before(group[0], build.nodes)
        for index, node in enumerate(group):
            _, weight, bias, _, lora_b, _ = _values(node)
            build, n = Builder(projection_name(node)), size_of(weight, 0)
            left, right = sum(ranks[:index]), sum(ranks[index + 1 :]) + filling
            before, after = ([zeros(graph, (n, width), like=weight)] if width else [] for width in (left, right))
            both = build("Concat", [weight, *before, lora_b, *after], "weight_and_lora_b", {"axis": 1})
            y = build("MatMul", [bracket, build.transposed(both, "weight_and_lora_b_transposed")], "base_and_update")
            replace_node(graph, node, build, build("Add", [y, bias], "bias") if bias is not None else y)


def _why_no_plugin(node: ir.Node, target: str) -> str | None:
    _, weight, _, lora_a, _, _ = _values(node)
    assert weight.dtype is not None
    dtype = np.dtype(weight.dtype.numpy()).name
    return tensorrt_plugin.why_not(size_of(weight, 1), size_of(weight, 0), size_of(lora_a, 0), dtype, target)


def _to_plugin(graph: ir.Graph, node: ir.Node) -> None:
    x, weight, bias, lora_a, lora_b, row_scale = _values(node)
    bias = bias or zeros(graph, (size_of(weight, 0),), like=weight)
    plugin = ir.node(
        LINEAR,
        [x, weight, bias, lora_a, lora_b, row_scale],
        tensorrt_plugin.NODE_ATTRIBUTES,
        domain=DOMAIN,
        name=projection_name(node),
    )
    result = plugin.outputs[0]
    result.name = f"{plugin.name}:0"
    built = Builder(projection_name(node))
    built.nodes.append(plugin)
    replace_node(graph, node, built, result)
