"""Parts of an ONNX graph for lowerings: new nodes, new initializers, and the replacement of a node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from slideredit_rt.export import tensorrt_plugin

DOMAIN = tensorrt_plugin.NAMESPACE
"""Domain of this package's nodes and local functions."""
LINEAR = tensorrt_plugin.NAME
"""An adapted projection; see `slideredit_rt.export.lowering`."""
QUANTIZED_LINEAR = "QuantizedLinear"
"""A quantised projection; see `slideredit_rt.export.quantised`."""
UPDATE = "MaskedLoRAUpdate"
"""The update of a quantised projection: y `[B, S, N]`, x `[B, S, K]`, lora_a, lora_b and row_scale as in `LINEAR`."""


class Builder:
    """Collector for the nodes of one replacement, which are named after their projection."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.nodes: list[ir.Node] = []

    def __call__(
        self,
        op_type: str,
        inputs: Iterable[ir.Value],
        name: str,
        attributes: Mapping[str, int | list[int]] | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        """Add a node with one output; return the output."""
        return self.with_outputs(1, op_type, inputs, name, attributes, domain=domain)[0]

    def with_outputs(
        self,
        count: int,
        op_type: str,
        inputs: Iterable[ir.Value],
        name: str,
        attributes: Mapping[str, int | list[int]] | None = None,
        *,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs; return them."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=count, name=f"{self.scope}/{name}")
        for index, output in enumerate(node.outputs):
            output.name = f"{self.scope}/{name}:{index}"
        self.nodes.append(node)
        return node.outputs

    def transposed(self, matrix: ir.Value, name: str) -> ir.Value:
        """Add the transposition of a matrix."""
        return self("Transpose", [matrix], name, {"perm": [1, 0]})


def replace_node(graph: ir.Graph, node: ir.Node, built: Builder, result: ir.Value) -> None:
    """Put the collected nodes in the place of a node, and `result` in the place of its output."""
    old = node.outputs[0]
    result.type, result.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], built.nodes, [old], [result])


def constant(graph: ir.Graph, value: np.ndarray, name: str) -> ir.Value:
    """Return an initializer. Initializers of the same name must have the same content."""
    if name not in graph.initializers:
        add_initializer(graph, ir.tensor(value, name=name))
    return graph.initializers[name]


def zeros(graph: ir.Graph, shape: tuple[int, ...], like: ir.Value) -> ir.Value:
    """Return an initializer of zeros with the dtype of `like`. Equal initializers are shared."""
    assert like.dtype is not None
    name = f"zeros_{like.dtype.name.lower()}_{'x'.join(map(str, shape))}"
    if name not in graph.initializers:
        add_initializer(graph, ir.tensor(np.zeros(shape, like.dtype.numpy()), like.dtype, name=name))
    return graph.initializers[name]


def integers(graph: ir.Graph, values: list[int], name: str) -> ir.Value:
    """Return an int64 initializer. Initializers of the same name must have the same content."""
    return constant(graph, np.array(values), name)


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> None:
    """Add an initializer under the tensor's name."""
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    graph.register_initializer(ir.Value(name=tensor.name, type=kind, shape=shape, const_value=tensor))


def size_of(value: ir.Value, axis: int) -> int:
    """Return the size of an axis, which must be known."""
    assert value.shape is not None
    return int(value.shape[axis])  # type: ignore[arg-type]


def present(values: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Return inputs of a node that are never left out."""
    found = [value for value in values if value is not None]
    assert len(found) == len(values)
    return found


def every_input(node: ir.Node, count: int) -> list[ir.Value | None]:
    """Return the inputs of a node with None for those that are left out, also at the end."""
    return [*node.inputs, *[None] * (count - len(node.inputs))]


def projection_name(node: ir.Node) -> str:
    """Return a projection's name in the transformer, from the name of its weight, the second input."""
    weight = node.inputs[1]
    return str(weight.name if weight else node.name).removeprefix("transformer.").removesuffix(".weight")
